"""What a mask costs next to the unmasked model, and a grid of masks and a sweep of ablations next to forward passes.

    python tests/benchmarks/mask_cost.py            # the embedded model on the CPU; on a GPU a Qwen3-4B-shaped model

Each mask in turn with none, the grid and the sweep in turns with the plain forward pass. Of forward passes and masks
the shortest times are compared, as what else runs only adds time; of decode steps the medians. On a CPU it is the time
of the processor, which depends less on what else runs there. The ideal of grid and sweep is what the blocks that they
have to evaluate take in a plain forward pass over the same batch. Exits with 1 if a ratio is over its limit.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
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
from melens.tracing.interventions import MassiveTokenRuns, Part, ablation
from melens.tracing.twin import running

FORWARD, DECODE, IDEAL = 1.02, 1.01, 1.1
"""What a forward pass and a decode step under a mask may take, and the grid and the sweep over their ideal."""


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
        add(f"{forward}, {mask_name}", seconds, ratio, FORWARD)
    for mask_name, mask in masks.items():
        if mask.select == "weight":  # how dims are chosen does not matter where none are
            seconds, ratio = decode_cost(plain, mask, tokens.flatten()[None, :512], 10 * repeats)
            add(f"decode step after 512 tokens, {mask_name}", seconds, ratio, DECODE)
    if on_gpu:
        bridge = build_bridge_from_module(plain, type(plain).__name__, hf_config=plain.config, model_name="qwen3")
    else:
        bridge = melens.load_model("smollm2-135m")
    grid_cost(bridge, start, add)
    sweep_cost(bridge, add)
    Console().print(table)
    sys.exit(0 if all(within) else 1)


def decode_cost(plain: Any, mask: WeMask, prefix: torch.Tensor, turns: int) -> tuple[float, float]:
    """Time decode steps in turns, two with the mask and two without: the median with it, and over that without.

    (Not of a copy beside the model: where its objects lie in memory alone makes a step 1 to 3 % slower.)
    """
    cache = plain(prefix, use_cache=True).past_key_values
    seconds: dict[bool, list[float]] = {False: [], True: []}
    chosen = mask.on(plain)

    def step() -> float:
        taken = seconds_of(lambda: plain(prefix[:, -1:], past_key_values=cache, use_cache=True))
        cache.crop(-1)
        return taken

    for turn in range(turns + 5):
        for is_masked in (True, False) if turn % 2 else (False, True):
            installed = chosen.install(plain)
            if not is_masked:  # put on and taken off again, which the caches of the processor have seen then, too
                installed.remove()
            taken = [step() for _ in range(4)][2:]
            installed.remove()
            if turn >= 5:  # the first warm up
                seconds[is_masked] += taken
    return median(seconds[True]), median(seconds[True]) / median(seconds[False])


def seconds_of(run: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
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


def grid_cost(bridge: Any, start: int, add: Callable[..., None]) -> None:
    """Time a grid of masks from one block on, in turns with forward passes of the unmasked model."""
    shape, per_batch = ((16, 2048), 4) if torch.cuda.is_available() else ((8, 256), 8)
    texts = torch.randint(40_000, shape, generator=torch.Generator().manual_seed(1)).to(bridge.cfg.device)
    n_layers, rates = len(bridge.blocks), (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)

    def forward(part: str) -> float:
        with running(bridge) as network:
            batches, run = texts.split(per_batch), network.get_submodule(part)
            return seconds_of(lambda: [run(input_ids=batch, use_cache=False) for batch in batches])

    def comparison() -> MaskComparison:
        return MaskComparison(bridge, texts, [start], texts_per_batch=per_batch, patterns=False)

    compared = comparison()
    compared.measure(WeMask(0.1, start=start), patterns=False)  # warms up
    whole, blocks, masked = [], [], []
    for rate in rates:
        whole.append(forward(""))
        blocks.append(forward("model"))
        masked.append(seconds_of(partial(compared.measure, WeMask(rate, start=start), patterns=False)))
    unmasked = min(seconds_of(comparison) for _ in range(2))
    one, all_blocks, of_mask = min(whole), min(blocks), min(masked)
    head = one - all_blocks  # is run for each mask, as its logits are compared
    seconds = unmasked + len(rates) * of_mask
    ideal = one + len(rates) * (all_blocks * (n_layers - start) / n_layers + head)
    add(f"forward with logits, {shape[0]} x {shape[1]} tokens", one, 1, None)
    add("  and compared, for the unmasked model", unmasked, unmasked / one, None)
    add(f"  a mask from block {start} of {n_layers}", of_mask, of_mask / one, None)
    add(f"grid of {len(rates)} masks, over its ideal: {ideal / seconds:.0%} reached", seconds, seconds / ideal, IDEAL)


def sweep_cost(bridge: Any, add: Callable[..., None]) -> None:
    """Time the removal of three parts of every block in turn, in turns with plain forward passes over the same rows."""
    n_layers = len(bridge.blocks)
    parts: tuple[Part, ...] = ("ffn", "ln2_no_gain", "attention")
    generator = torch.Generator().manual_seed(2)

    def remove(runs: MassiveTokenRuns, layer: int) -> None:
        runs.run_each([ablation(bridge, layer, part) for part in parts], layer)

    for name, positions in (("token 0", [0] * 36), ("tokens 0 to 3", [*range(4)] * 9)):
        prompts = [torch.randint(40_000, (16,), generator=generator) for _ in positions]
        runs = MassiveTokenRuns(bridge, prompts, positions)
        cut = torch.stack(prompts)[:, : max(positions) + 1].to(bridge.cfg.device)
        remove(runs, n_layers // 2)  # warms up: a kernel may be chosen at the first pass of its shape
        ideal, swept = 0.0, 0.0
        for layer in range(n_layers):
            with running(bridge) as network:
                plain = seconds_of(partial(network.base_model, input_ids=cut, use_cache=False))
            ideal += plain * len(parts) * (n_layers - layer) / n_layers
            swept += seconds_of(partial(remove, runs, layer))
        add(f"sweep at {name} of 36 prompts, over its ideal: {ideal / swept:.0%} reached", swept, swept / ideal, IDEAL)


if __name__ == "__main__":
    main()
