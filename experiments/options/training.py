"""What `exp=sft`, `dpo`, `grpo` and `tables` are asked to train, with the paper's values filled in."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.options.masks import Preset, presets_of
from experiments.options.reading import OptionError
from experiments.options.schema import Options
from melens.training.recipe import Lora, Recipe, check_installed, known_datasets, recipe_fields, training_conf
from melens.validation.types import in_words

__all__ = ["Planned", "planned_training"]

_LIMITS = {"training.limit", "training.max_length", "training.steps"}
"""Options whose null, typed, means no limit; elsewhere null means what the paper says."""
DATASETS = {"sft": "gsm8k", "dpo": "hh_rlhf", "grpo": "gsm8k"}


@dataclass(frozen=True)
class Planned:
    """The node `training` for one method, with the paper's values filled in.

    Attributes:
        recipe: hyperparameters; `precision` is settled once it is known whether there is a GPU (`on`).
        dataset, data_dir, columns, split, limit, chat: what is learnt.
        mask: None for none.
        gate: None for none.
        trace_every, trace_prompts: how often, and on how many prompts, the model is looked into.
        resume: the folder of the run to go on in.
        seeds: of exp=tables.
    """

    recipe: Recipe
    dataset: str
    data_dir: str | None
    columns: dict[str, str]
    split: str
    limit: int | None
    chat: bool | None
    mask: Preset | None
    gate: str | None
    trace_every: int
    trace_prompts: int
    resume: Path | None
    seeds: tuple[int, ...]

    def on(self, *, gpu: bool) -> Planned:
        """Settle what depends on the machine."""
        if self.recipe.precision != "auto":
            return self
        return replace(self, recipe=replace(self.recipe, precision="mixed" if gpu else "float32"))


def planned_training(options: Options, method: str, *, dataset: str | None = None) -> Planned:
    """Fill the paper's values for a method and a dataset into the node `training`.

    Args:
        options: of the run.
        method: `sft`, `dpo` or `grpo`.
        dataset: where the options name none.

    Raises:
        MelensError: what one training cannot have.
    """
    node = options.training
    dataset = node.dataset or dataset or DATASETS[method]
    if len(node.seed) != 1 and options.exp.name != "tables":
        raise OptionError("training.seed is a list, which only exp=tables takes; -m training.seed=0,1,2 sweeps.")
    given = {
        key: value for key, value in node if value is not None or f"training.{key}" in options.given.keys() & _LIMITS
    }
    values = training_conf(method, known_datasets().get(dataset, {}).get(method, {}), given)
    own = {key: value for key, value in values.items() if key in recipe_fields()}
    lora = Lora(**node.lora.model_dump()) if node.peft == "lora" else None
    recipe = Recipe(**own | {"method": method, "lora": lora, "seed": node.seed[0]})
    check_installed(recipe.report_to)
    return Planned(
        recipe=recipe,
        dataset=dataset,
        data_dir=node.data_dir,
        columns=node.columns,
        split=node.split,
        limit=values["limit"],
        chat=None if node.chat == "auto" else node.chat,
        mask=_mask(options),
        gate=None if node.gate == "none" else node.gate,
        trace_every=node.trace_every,
        trace_prompts=node.trace_prompts,
        resume=None if node.resume is None else Path(os.path.expanduser(node.resume)),
        seeds=tuple(node.seed),
    )


def _mask(options: Options) -> Preset | None:
    if options.training.mask in ("none", "off"):
        return None
    (preset,) = presets_of([options.training.mask], options, key="training.mask")
    for name, value in preset.options:
        if name in ("rate", "select", "site", "start", "seed") and (isinstance(value, list) or value == "all_blocks"):
            raise OptionError(
                f"wemask.{name} is {in_words(value)}, and a model is trained with one mask; "
                f"-m wemask.{name}=... sweeps."
            )
    if not preset.options.rate:
        raise OptionError("wemask.rate is 0, which masks nothing; training.mask=off trains without a mask.")
    return preset
