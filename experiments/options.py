"""What may be asked for: checked in a second, before the libraries that the experiments need are even imported."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.benchmark_options import asked_for
from experiments.table_options import asked_table
from experiments.training_options import planned_training
from melens.errors import MelensError
from melens.training.recipe import METHODS

__all__ = ["check_options", "experiments_of"]

OPTIONS = {
    "max_batch_tokens": (int, "a whole number"),
    "seed": (int, "a whole number"),
    "png": (bool, "true or false"),
    "prompts.max_tokens": (int, "a whole number or null"),
    "model.seed": (int, "a whole number"),
}


def check_options(cfg: DictConfig) -> None:
    """Check the options that Hydra knows only as some value, and let `prompts.bos` and `.tasks` be given plainly."""
    for key, (kind, allowed) in OPTIONS.items():
        value = OmegaConf.select(cfg, key)
        may_be_absent = "." in key
        wrong_kind = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
        if (value is None and not may_be_absent) or (value is not None and (wrong_kind or (kind is int and value < 0))):
            raise MelensError(f"{key} is {value!r}; it must be {allowed}.")
    if isinstance(cfg.exp.get("experiments"), str):
        cfg.exp.experiments = [cfg.exp.experiments]
    if not cfg.exp.get("experiments", [""]):
        raise MelensError("exp.experiments is empty; it must name at least one experiment.")
    for name in cfg.exp.get("experiments", []):
        if not OmegaConf.is_dict(cfg.exp.get(name)):
            allowed = ", ".join(str(key) for key, value in cfg.exp.items() if OmegaConf.is_dict(value))
            raise MelensError(f"exp.experiments names {name!r}; allowed are {allowed}.")
    for name, options in experiments_of(cfg).items():
        for key, value in options.items():
            check_experiment_option(name, str(key), value)
    for key, least in (("n_texts", 1), ("n_tokens", 3)):
        if not (_is_count(cfg.data[key]) and cfg.data[key] >= least):
            raise MelensError(f"data.{key} is {cfg.data[key]!r}; it must be a whole number of at least {least}.")
    check_generation(cfg.generate)
    if "benchmark" in experiments_of(cfg):
        asked_for(cfg)
    if cfg.exp.name in METHODS:
        planned_training(cfg, cfg.exp.name)
    if cfg.exp.name == "tables":
        asked_table(cfg)
    cfg.prompts.bos = str(cfg.prompts.bos).lower()
    if isinstance(cfg.prompts.tasks, str):
        cfg.prompts.tasks = [cfg.prompts.tasks]


LEAST = {
    "top_dims": 1, "map_tokens": 2, "rank_tokens": 2, "rank_prompts": 1, "max_position": 1, "n_prompts": 1,
    "max_tokens": 2, "n_first_tokens": 1, "texts_per_batch": 1,
}  # fmt: skip


def check_experiment_option(experiment: str, key: str, value: Any) -> None:
    """Check an option of an experiment."""
    allowed = None
    if key in ("log_scale", "keep", "report") and not isinstance(value, bool):
        allowed = "true or false"
    elif key == "patterns" and value not in ("drawn", "all", "none"):
        allowed = "drawn, all or none"
    elif key in LEAST and not (_is_count(value) and value >= LEAST[key]):
        allowed = f"a whole number of at least {LEAST[key]}"
    elif key == "top_share" and not _is_share(value):
        allowed = "a share of the width, over 0 and at most 1"
    elif key == "other_shares" and not (OmegaConf.is_list(value) and all(map(_is_share, value))):
        allowed = "a list of shares of the width, each over 0 and at most 1"
    elif key == "length_bins" and not (
        OmegaConf.is_list(value) and all(map(_is_count, value)) and list(value) == sorted({0, *value})[1:]
    ):
        allowed = "a list of rising whole numbers of tokens"
    if allowed is not None:
        raise MelensError(f"exp.{key} of {experiment} is {value!r}; it must be {allowed}.")


def check_generation(options: DictConfig) -> None:
    """Check what `exp=generate` writes, and how."""
    texts = options.prompt if OmegaConf.is_list(options.prompt) else [options.prompt]
    are_texts = len(texts) > 0 and all(isinstance(text, str) and text.strip() for text in texts)
    seeds = options.seeds
    are_seeds = OmegaConf.is_list(seeds) and len(seeds) > 0 and all(_is_count(seed) and seed >= 0 for seed in seeds)
    is_number = isinstance(options.temperature, int | float) and not isinstance(options.temperature, bool)
    for key, is_allowed, allowed in (
        ("prompt", options.prompt is None or are_texts, "a text that is not empty, a list of them, or null"),
        (
            "max_new_tokens",
            _is_count(options.max_new_tokens) and options.max_new_tokens >= 1,
            "a whole number of at least 1",
        ),
        ("chat", isinstance(options.chat, bool), "true or false"),
        ("sample", isinstance(options.sample, bool), "true or false"),
        ("temperature", is_number and 0 < options.temperature < math.inf, "a number over 0"),
        ("top_p", _is_share(options.top_p), "a share of the probability, over 0 and at most 1"),
        ("seeds", are_seeds, "a list of whole numbers, as [0,1]"),
    ):
        if not is_allowed:
            raise MelensError(f"generate.{key} is {options[key]!r}; it must be {allowed}.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def experiments_of(cfg: DictConfig) -> dict[str, DictConfig]:
    """Return the options of each experiment that a configuration asks for, in order."""
    names = cfg.exp.get("experiments")
    return {cfg.exp.name: cfg.exp} if names is None else {name: cfg.exp[name] for name in names}
