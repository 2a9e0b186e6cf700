"""What `exp=benchmark` is asked for, checked before anything slow: benchmarks, masks, and how to ask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from melens.benchmarks.catalog import Benchmark, benchmarks_of
from melens.errors import MelensError

__all__ = ["Asked", "Preset", "asked_for", "read_presets"]

_MASKS = Path(__file__).parents[1] / "conf" / "wemask"
_DEFAULT_TASKS = ("perplexity", "induction", "copy", "needle")
_DEFAULT_MASKS = ("off", "paper", "random", "magnitude")

TABLES: dict[int, dict[str, Any]] = {
    1: {"tasks": ("mmlu", "piqa", "arc_challenge", "openbookqa", "mathqa", "strategyqa"), "masks": ("off", "paper")},
    2: {"tasks": ("gsm8k", "aime", "hendrycks_math500", "sorry_bench", "xstest"), "masks": ("off", "paper")},
    5: {"tasks": ("mmlu", "piqa", "arc_challenge", "openbookqa", "mathqa", "strategyqa"), "masks": _DEFAULT_MASKS},
    6: {"tasks": ("mmlu", "piqa", "arc_challenge", "openbookqa", "mathqa"), "masks": ("off", "paper")},
    7: {"tasks": ("mmlu", "piqa", "arc_challenge", "openbookqa", "strategyqa"), "masks": ("off", "paper"), "rate": 0.1},
}
"""What the rows and columns of the paper's tables need without training. Its text names no rates but that of table 7:
elsewhere it reports the best of several."""

_RATES = [0.01, 0.03, 0.1, 0.2]


@dataclass(frozen=True)
class Preset:
    """A preset of `conf/wemask/`, with the user's own options of the node `wemask` over it."""

    name: str
    options: dict[str, Any]
    has_own_layers: bool


@dataclass(frozen=True)
class Asked:
    """The node `benchmark` of a configuration, with the presets of its table filled in.

    Attributes:
        left_out: benchmarks of the table that local data cannot have.
        needle: lengths and depths.
        The others are the keys of the node.
    """

    benchmarks: tuple[Benchmark, ...]
    left_out: tuple[str, ...]
    masks: tuple[Preset, ...]
    table: int | None
    generates: bool
    layers: Any
    limit: int | None
    seeds: tuple[int, ...]
    data_dir: str | None
    chat: bool | None
    temperature: float | None
    top_p: float | None
    max_new_tokens: int | None
    batch_size: int
    judge: str | None
    needle: tuple[tuple[int, ...], tuple[float, ...]]

    def in_chat(self, benchmark: Benchmark) -> bool:
        """Tell whether a benchmark is asked in the chat template: what the model writes freely, unless told else."""
        if benchmark.config is None:
            return False
        writes = self.generates or benchmark.kind == "safety"
        return writes if self.chat is None else self.chat

    def layers_of(self, benchmark: Benchmark, preset: Preset) -> dict[str, Any]:
        """Return which blocks to mask: by what the benchmark asks for (appendix C), or as told."""
        if self.layers != "auto":
            return {"layers": self.layers}
        if preset.has_own_layers:
            return {}
        return {"layers": "first" if benchmark.kind in ("maths", "safety") else "all"}


def asked_for(cfg: DictConfig) -> Asked:
    """Read and check the node `benchmark`.

    Raises:
        MelensError: what is not allowed, in a sentence.
    """
    node: dict[str, Any] = OmegaConf.to_container(cfg.benchmark, resolve=True)
    table = node["table"]
    if table is not None and table not in TABLES:
        raise MelensError(f"benchmark.table is {table!r}; it must be one of {', '.join(map(str, TABLES))}, or null.")
    preset = TABLES.get(table, {})
    tasks = _names(node["tasks"] or preset.get("tasks") or _DEFAULT_TASKS)
    benchmarks = benchmarks_of(tasks)
    data_dir = node["data_dir"]
    left_out: list[str] = []
    if data_dir is not None:
        if not Path(str(data_dir)).expanduser().is_dir():
            raise MelensError(f"benchmark.data_dir is {data_dir!r}; there is no such folder.")
        if node["tasks"] is None:  # those of a table
            left_out = [benchmark.name for benchmark in benchmarks if benchmark.config and benchmark.file is None]
            benchmarks = [benchmark for benchmark in benchmarks if benchmark.name not in left_out]
    mode = node["mode"] or ("generate" if preset else "loglikelihood")
    for key, is_allowed, allowed in _RULES:
        if not is_allowed(node[key]):
            raise MelensError(f"benchmark.{key} is {node[key]!r}; it must be {allowed}.")
    lengths, depths = node["needle"]["lengths"], node["needle"]["depths"]
    if not (_is_list(lengths, lambda n: _is_count(n, 64)) and _is_list(depths, _is_depth)):
        raise MelensError("benchmark.needle needs lengths of at least 64 tokens and depths from 0 to 1, as lists.")
    masks = _names(node["masks"] or preset.get("masks") or _DEFAULT_MASKS)
    seeds = node["seeds"] if isinstance(node["seeds"], list) else [node["seeds"]]
    return Asked(
        benchmarks=tuple(benchmarks),
        left_out=tuple(left_out),
        masks=tuple(read_presets(masks, cfg.wemask, preset)),
        table=table,
        generates=mode == "generate",
        layers=node["layers"],
        limit=node["limit"],
        seeds=tuple(seeds),
        data_dir=None if data_dir is None else str(data_dir),
        chat=None if node["chat"] == "auto" else node["chat"],
        temperature=node["temperature"],
        top_p=node["top_p"],
        max_new_tokens=None if node["max_new_tokens"] == "auto" else node["max_new_tokens"],
        batch_size=node["batch_size"],
        judge=node["judge"],
        needle=(tuple(lengths), tuple(depths)),
    )


def _names(given: Any) -> list[str]:
    names = [given] if isinstance(given, str) else list(given)
    return ["off" if name is False else name for name in names]  # what YAML makes of off


def read_presets(
    names: list[str], wemask: DictConfig, table: dict[str, Any], key: str = "benchmark.masks"
) -> list[Preset]:
    """Read presets by name; what the user's node says otherwise than the paper's preset holds for all of them."""
    known = sorted(path.stem for path in _MASKS.glob("*.yaml"))
    paper = yaml.safe_load((_MASKS / "paper.yaml").read_text("utf-8"))
    node: dict[str, Any] = OmegaConf.to_container(wemask, resolve=True)
    changed = {key: value for key, value in node.items() if value != paper[key]}
    if "select" in changed:
        raise MelensError(f"The masks are those of {key}, as off, paper or random; wemask.select is not for it.")
    if table and "rate" not in changed:
        changed["rate"] = table.get("rate", _RATES)
    presets = []
    for name in names:
        if name not in known:
            raise MelensError(f"{key} names {name!r}; allowed are {', '.join(known)}.")
        own = yaml.safe_load((_MASKS / f"{name}.yaml").read_text("utf-8"))
        own.pop("defaults", None)
        options = paper | own | changed | ({"rate": 0} if own.get("rate") == 0 else {})
        presets.append(Preset(name, options, "layers" in own or "layers" in changed))
    return presets


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_depth(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(of, value))


def _are_seeds(value: Any) -> bool:
    return _is_count(value, 0) or _is_list(value, lambda seed: _is_count(seed, 0))


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("mode", lambda value: value in (None, "loglikelihood", "generate"), "loglikelihood or generate"),
    (
        "layers",
        lambda value: value in ("auto", "all", "first") or _is_list(value, lambda layer: _is_count(layer, 0)),
        "auto, all, first or a list of blocks",
    ),
    ("limit", lambda value: value is None or _is_count(value), "a whole number of at least 1, or null"),
    ("seeds", _are_seeds, "a list of whole numbers, as [0,1,2]"),
    ("chat", lambda value: value == "auto" or isinstance(value, bool), "auto, true or false"),
    ("temperature", lambda value: value is None or _is_positive(value), "a number over 0, or null for the model's own"),
    (
        "top_p",
        lambda value: value is None or (_is_positive(value) and value <= 1),
        "over 0 and at most 1, or null for the model's own",
    ),
    ("max_new_tokens", lambda value: value == "auto" or _is_count(value), "a whole number of at least 1, or auto"),
    ("batch_size", _is_count, "a whole number of at least 1"),
    ("judge", lambda value: value is None or isinstance(value, str), "the name of a chat model, or null"),
)
