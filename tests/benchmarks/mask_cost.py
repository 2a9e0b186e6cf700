"""What a mask costs next to the unmasked model, and a grid of masks next to one forward pass, in one run.

    python tests/benchmarks/mask_cost.py            # the embedded model on the CPU; on a GPU a Qwen3-4B-shaped model

Each mask in turn with none. Forward passes: the shortest over the shortest, as what else runs only adds time. Decode
steps, one by one in turns: the median over the median. Exits with 1 if a ratio is over its limit.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from trace_cost import QWEN3_4B
from transformer_lens.model_bridge.sources import build_bridge_from_module

import melens
from melens import WeMask
from melens.masks.comparison import MaskComparison
from melens.models.loading import embedded_model_folder
from melens.tracing.twin import running

LIMIT = 1.02


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        config = transformers.AutoConfig.for_model("qwen3", **QWEN3_4B)
        with torch.device("cuda"):
            plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        name, shape, start = "Qwen3-4B-shaped, bf16, GPU", (1, 4096), 7
    else:
        plain = transformers.AutoModelForCausalLM.from_pretrained(embedded_model_folder(), attn_implementation="sdpa")
        name, shape, start = "SmolLM2-135M, fp32, CPU", (4, 256), 12
    tokens = torch.randint(40_000, shape, generator=torch.Generator().manual_seed(0)).to(plain.device)
    warnings.filterwarnings("ignore", message="The gains of block")  # random weights
    table = Table("", "time", "× unmasked", "limit", title=name)
    within = []

    def add(what: str, seconds: float, ratio: float, limit: float | None) -> None:
        table.add_row(what, f"{seconds * 1e3:,.1f} ms", f"{ratio:.3f}", "" if limit is None else f"{limit:.3f}")
        within.append(limit is None or ratio <= limit)

    masks = {
        f"{site}, {select}": WeMask(0.1, select, site, start=start)
        for site in ("attn_in", "ln1_in", "resid_pre")
        for select in ("weight", "magnitude")
    }
    forward = f"forward, {shape[0]} x {shape[1]} tokens"
    for mask_name, mask in masks.items():
        seconds, ratio = against_unmasked(plain, mask, lambda: plain.base_model(tokens, use_cache=False), repeats)
        add(f"{forward}, {mask_name}", seconds, ratio, LIMIT)
    for mask_name, mask in masks.items():
        if mask.select == "weight":  # how dims are chosen does not matter where none are
            seconds, ratio = decode_cost(plain, mask, tokens.flatten()[None, :512], 20 * repeats)
            add(f"decode step after 512 tokens, {mask_name}", seconds, ratio, LIMIT)
    grid_cost(plain, start, add)
    Console().print(table)
    sys.exit(0 if all(within) else 1)


def decode_cost(plain: Any, mask: WeMask, prefix: torch.Tensor, steps: int) -> tuple[float, float]:
    """Time single decode steps in turns, of the model and of a masked copy on the same weights.

    Returns the masked copy's median, and over the model's.
    """
    masked = copy.deepcopy(plain, {id(weight): weight for weight in plain.parameters()})
    cache = plain(prefix, use_cache=True).past_key_values
    seconds: dict[bool, list[float]] = {False: [], True: []}

    def step(model: Any) -> Callable[[], object]:
        return lambda: model(prefix[:, -1:], past_key_values=cache, use_cache=True)

    with mask.applied(masked):
        for at in range(steps + 10):
            for is_masked in (True, False) if at % 2 else (False, True):
                taken = seconds_of(step(masked if is_masked else plain))
                cache.crop(-1)
                if at >= 10:  # the first warm up
                    seconds[is_masked].append(taken)
    return median(seconds[True]), median(seconds[True]) / median(seconds[False])


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def against_unmasked(model: Any, mask: WeMask, run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Time runs in turns, with the mask and without: the shortest time with it, and over the shortest without."""
    masked, unmasked = [], []
    for repeat in range(repeats + 1):
        without = seconds_of(run)
        with mask.applied(model):
            within = seconds_of(run)
        if repeat:  # the first warms up
            masked.append(within)
            unmasked.append(without)
    return min(masked), min(masked) / min(unmasked)


def grid_cost(plain: Any, start: int, add: Callable[..., None]) -> None:
    """Time a grid of masks from one block on, in forward passes of the unmasked model with its logits."""
    generator = torch.Generator().manual_seed(1)
    if plain.device.type == "cuda":
        bridge = build_bridge_from_module(plain, type(plain).__name__, hf_config=plain.config, model_name="qwen3")
        texts, per_batch = torch.randint(40_000, (16, 2048), generator=generator), 4
    else:
        bridge = melens.load_model("smollm2-135m")
        texts, per_batch = torch.randint(40_000, (16, 256), generator=generator), 8
    texts = texts.to(plain.device)
    n_layers, n_masks = len(bridge.blocks), 6
    masks = [WeMask(rate, start=start) for rate in (0.01, 0.03, 0.1, 0.2, 0.3, 0.5)]

    def forward(run: Callable[..., object]) -> Callable[[], object]:
        return lambda: [run(input_ids=batch, use_cache=False) for batch in texts.split(per_batch)]

    with running(bridge) as network:
        whole, blocks = (median(seconds_of(forward(run)) for _ in range(3)) for run in (network, network.base_model))
    head = 1 - blocks / whole
    MaskComparison(bridge, texts[:2, :64], [start]).measure(masks[0])  # warms up
    comparison: list[MaskComparison] = []
    options = {"texts_per_batch": per_batch, "patterns": False}
    seconds = seconds_of(lambda: comparison.append(MaskComparison(bridge, texts, [start], **options)))
    seconds += sum(seconds_of(lambda mask=mask: comparison[0].measure(mask, patterns=False)) for mask in masks)
    share = (n_layers - start) / n_layers
    ideal = 1 + n_masks * share
    possible = 1 + n_masks * (share * (1 - head) + head)
    add(f"forward with logits, {len(texts)} x {texts.shape[1]} tokens", whole, 1, None)
    add(f"grid of {n_masks} masks from block {start} of {n_layers}", seconds, seconds / whole, None)
    add("  over 1 + N (L - s) / L forward passes", seconds, seconds / whole / ideal, None)
    add(f"  the same, with the head's {head:.0%} run for each mask", seconds, seconds / whole / possible, 1.1)


if __name__ == "__main__":
    main()
