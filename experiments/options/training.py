"""The request of `exp=sft`, `dpo`, `grpo` and `tables`: the node `training` with the paper's values filled in."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

from experiments.options.masks import Preset, check_one_mask, presets_of
from experiments.options.reading import OptionError
from experiments.options.schema import Options, as_list
from melens.data.reading import file_rows
from melens.training.datasets import PYTHON_DOCS, file_of
from melens.training.plan import QUANTIZED, SPREAD, TrainingPlan
from melens.training.recipe import Lora, Recipe, check_installed, known_datasets, training_conf

__all__ = ["DATASETS", "TrainingRequest", "training_request"]

_LIMITS = {"training.limit", "training.max_length", "training.steps"}
"""Options whose null, typed, means no limit; elsewhere null stands for the paper's value."""
DATASETS = {"sft": "gsm8k", "dpo": "hh_rlhf", "grpo": "gsm8k", "pretrain": PYTHON_DOCS}


@dataclass(frozen=True)
class TrainingRequest:
    """One training: what is trained on what, with which mask if any, and the folder of the run to go on in."""

    plan: TrainingPlan
    mask: Preset | None
    resume: Path | None


def training_request(options: Options, method: str, *, dataset: str | None = None) -> TrainingRequest:
    """Fill the paper's values for a method and a dataset into the node `training`.

    Args:
        options: of the run.
        method: `sft`, `dpo`, `grpo` or `pretrain`.
        dataset: where the options name none.

    Raises:
        MelensError: an option is one that a single training cannot have.
    """
    node = options.training
    if options.model.device_map is not None or options.model.max_memory is not None:
        raise OptionError(SPREAD)
    if options.model.quantize is not None:
        raise OptionError(QUANTIZED)
    dataset = node.dataset or dataset or DATASETS[method]
    if method == "pretrain" and "training.dataset" not in options.typed:  # a scale's has rows, and is no text
        dataset = PYTHON_DOCS
    if len(node.seed) != 1 and options.exp.name != "tables":
        raise OptionError("training.seed is a list, which only exp=tables takes. Sweep with -m training.seed=0,1,2.")
    no_limit = options.given.keys() & _LIMITS
    given = {key: value for key, value in node if value is not None or f"training.{key}" in no_limit}
    values = training_conf(method, known_datasets().get(dataset, {}).get(method, {}), given)
    own = {f.name: values[f.name] for f in fields(Recipe) if f.name in values}
    lora = Lora(**node.lora.model_dump()) if node.peft == "lora" else None
    recipe = Recipe(**own | {"method": method, "lora": lora, "seed": node.seed[0]})
    check_installed(recipe.report_to)
    if method == "pretrain":
        _check_from_scratch(options, dataset, values["trace_every"])
    elif dataset != "sums" and (path := file_of(dataset, method, node.data_dir)) is not None:
        file_rows(path)
    as_given = node.model_dump(include={"data_dir", "columns", "split", "held_out", "validation"})
    as_given |= {name: values[name] for name in ("trace_every", "trace_prompts") if name in values}
    chat, gate = None if node.chat == "auto" else node.chat, None if node.gate == "none" else node.gate
    plan = TrainingPlan(recipe, dataset, limit=values["limit"], chat=chat, gate=gate, **as_given)
    return TrainingRequest(plan, _mask(options), None if node.resume is None else Path(os.path.expanduser(node.resume)))


def _check_from_scratch(options: Options, dataset: str, trace_every: int) -> None:
    node = options.training
    if options.model.source != "random":
        raise OptionError("exp=pretrain trains a model with random weights: model=llama-10m, model=random, ...")
    limit = node.limit if "training.limit" in options.typed else None  # a scale's is of rows
    unknown = {"data_dir": node.data_dir, "limit": limit, "peft": None if node.peft == "none" else node.peft}
    for name in (name for name, value in unknown.items() if value is not None):
        raise OptionError(f"exp=pretrain has no training.{name}: it trains all weights on the whole of a text.")
    length, context = node.max_length, options.model.config.get("max_position_embeddings")
    if length is not None and context is not None and length > context:
        raise OptionError(f"training.max_length is {length:,}; lower it to the model's context of {context:,}.")
    for key, text in (("dataset", dataset), ("validation", node.validation)):
        if text not in (None, PYTHON_DOCS) and "/" not in text and not Path(os.path.expanduser(text)).exists():
            raise OptionError(
                f"There is no file or folder {text!r}. training.{key} is a file or a folder of text, a hub id "
                f"(org/name), or {PYTHON_DOCS}."
            )
    if node.mask not in ("none", "off") and not trace_every and isinstance(as_list(options.wemask.start)[0], str):
        raise OptionError(
            "The mask begins behind the ME layer, which is looked for every training.trace_every steps. Set it, as to "
            "100, or wemask.start to a block."
        )


def _mask(options: Options) -> Preset | None:
    if options.training.mask in ("none", "off"):
        return None
    (preset,) = presets_of([options.training.mask], options, key="training.mask")
    if preset.options.rate == 0:
        raise OptionError("wemask.rate is 0, which masks nothing. Set training.mask=off to train without a mask.")
    check_one_mask(preset.options, "a training")
    return preset
