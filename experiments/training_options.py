"""What `exp=sft`, `dpo`, `grpo` and `tables` are asked for, checked before anything slow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.benchmark_options import Preset, read_presets
from melens.errors import MelensError
from melens.training.recipe import Lora, Recipe, check_extra, known_datasets, recipe_fields, training_conf

__all__ = ["Planned", "planned_training"]

DATASETS = {"sft": "gsm8k", "dpo": "hh_rlhf", "grpo": "gsm8k"}
GATES = ("none", "headwise", "elementwise")


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


def planned_training(cfg: DictConfig, method: str, *, dataset: str | None = None) -> Planned:
    """Read and check the node `training`.

    Args:
        cfg: the whole configuration.
        method: `sft`, `dpo` or `grpo`.
        dataset: where the node names none.

    Raises:
        MelensError: what is not allowed, in a sentence.
    """
    node: dict[str, Any] = OmegaConf.to_container(cfg.training, resolve=True)
    dataset = node["dataset"] or dataset or DATASETS[method]
    if not isinstance(dataset, str):
        raise MelensError(f"training.dataset is {dataset!r}; it must be a name, a hub id or a file.")
    gate, peft, mask = (_word(node[key]) for key in ("gate", "peft", "mask"))
    if gate not in GATES:
        raise MelensError(f"training.gate is {gate!r}; allowed are {', '.join(GATES)}.")
    if peft not in ("none", "lora"):
        raise MelensError(f"training.peft is {peft!r}; allowed are none and lora.")
    for key, least in (("trace_every", 0), ("trace_prompts", 1)):
        if not (isinstance(node[key], int) and node[key] >= least):
            raise MelensError(f"training.{key} is {node[key]!r}; it must be a whole number of at least {least}.")
    if not (isinstance(node["columns"], dict) and all(isinstance(name, str) for name in node["columns"].values())):
        raise MelensError(f"training.columns is {node['columns']!r}; it must be like {{prompt: question}}.")
    if not (node["data_dir"] is None or isinstance(node["data_dir"], str)):
        raise MelensError(f"training.data_dir is {node['data_dir']!r}; it must be a folder.")
    limit = node["limit"]
    if limit is not None and not (isinstance(limit, int) and limit >= 1):
        raise MelensError(f"training.limit is {limit!r}; it must be a whole number of at least 1, or null.")
    if node["chat"] != "auto" and not isinstance(node["chat"], bool):
        raise MelensError(f"training.chat is {node['chat']!r}; allowed are auto, true and false.")
    seeds = node["seed"] if isinstance(node["seed"], list) else [node["seed"]]
    if len(seeds) != 1 and (cfg.exp.name != "tables" or not seeds):
        raise MelensError("training.seed is a list, which only exp=tables takes; -m training.seed=0,1,2 sweeps.")
    options = training_conf(method, known_datasets().get(dataset, {}).get(method, {}), node)
    own = {key: value for key, value in options.items() if key in recipe_fields()}
    if peft == "lora":
        unknown = set(node["lora"]) - {"rank", "alpha", "dropout"}
        if unknown:
            raise MelensError(f"training.lora has no {unknown.pop()!r}; allowed are rank, alpha and dropout.")
    own |= {"method": method, "lora": Lora(**node["lora"]) if peft == "lora" else None, "seed": seeds[0]}
    recipe = Recipe(**own)
    check_extra(recipe.report_to)
    resume = None if node["resume"] is None else Path(str(node["resume"])).expanduser()
    if resume is not None and not resume.is_dir():
        raise MelensError(f"training.resume is {str(resume)!r}; there is no such folder.")
    preset = None
    if mask not in ("none", "off"):
        (preset,) = read_presets([mask], cfg.wemask, {}, "training.mask")
        for name in ("rate", "select", "site", "start", "seed"):
            if isinstance(preset.options[name], list) or preset.options[name] == "all_blocks":
                raise MelensError(
                    f"wemask.{name} is {preset.options[name]}, and a model is trained with one mask; "
                    f"-m wemask.{name}=... sweeps."
                )
        if not preset.options["rate"]:
            raise MelensError("wemask.rate is 0, which masks nothing; training.mask=off trains without a mask.")
    return Planned(
        recipe=recipe,
        dataset=dataset,
        data_dir=node["data_dir"],
        columns=node["columns"] or {},
        split=node["split"],
        limit=options["limit"] if limit is None else limit,
        chat=None if node["chat"] == "auto" else node["chat"],
        mask=preset,
        gate=None if gate == "none" else gate,
        trace_every=node["trace_every"],
        trace_prompts=node["trace_prompts"],
        resume=resume,
        seeds=tuple(seeds),
    )


def _word(value: Any) -> Any:
    return {False: "off", None: "none"}.get(value, value)  # what YAML makes of off and null
