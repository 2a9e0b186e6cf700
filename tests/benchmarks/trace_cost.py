"""What a trace costs next to the plain forward pass over the same batches, by the number and length of prompts.

    python tests/benchmarks/trace_cost.py            # the embedded model on the CPU; on a GPU a Qwen3-4B-shaped model

Prints the time of the plain forward pass, and the ratio to it of a trace with the default probes, and of one with
`find_me_layer` and the tables `norm` and `sink_mass`; and the peak memory of both, over what was there before (a
captured pass allocates nothing: it runs in the memory that its graph holds). Exits with 1 if one is over its limit.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from planted import plant

import melens
from melens.models.loading import embedded_model_folder
from melens.models.twins import plain_twin

QWEN3_4B = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True,
}  # fmt: skip

FIRST = 17
"""The token that every prompt begins with."""

Run = Callable[[], object]


SHAPES_ON_CPU = [(8, 512), (36, 60), (256, 16), (1, 64), (1, 2048)]
SHAPES_ON_GPU = [(1, 64), (1, 512), (1, 4096), (8, 512), (64, 64), (36, 300), (256, 64), (512, 16), (1, 16384)]
TRACE, TABLES, SHORT = 1.05, 1.10, 0.8
"""Limits of a trace over the plain forward pass: by itself, with ME layer and tables, and of up to 512 tokens on a GPU,
where a plain forward pass waits for Python."""
OVER_PLAIN = 64 * 2**20
"""Limit of peak memory over that of the plain forward pass, in bytes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--with-cache", action="store_true", help="run_with_cache, too, on 8 prompts of 512 tokens")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    bridge, plain = qwen3_4b_shaped() if on_gpu else embedded()
    where = f"Qwen3-4B-shaped, bf16, {torch.cuda.get_device_name()}" if on_gpu else "SmolLM2-135M, fp32, CPU"
    table = Table("prompts × tokens", "plain", "trace", "with tables", "limits", "memory, plain to trace", title=where)
    are_within = []
    for n_prompts, n_tokens in SHAPES_ON_GPU if on_gpu else SHAPES_ON_CPU:
        runs = variants(bridge, plain, n_prompts, n_tokens)
        times = measure_times(runs, arguments.repeats * (5 if n_prompts * n_tokens < 1000 else 1))
        ratios = [times[name] / times["plain"] for name in ("trace", "tables")]
        memory = {name: (peak_allocated if on_gpu else peak_resident)(runs[name]) for name in ("plain", "trace")}
        limits = (SHORT, SHORT) if on_gpu and n_prompts * n_tokens <= 512 else (TRACE, TABLES)
        within = [ratio <= limit for ratio, limit in zip(ratios, limits, strict=True)]
        within.append(memory["trace"] - memory["plain"] <= OVER_PLAIN)
        are_within += within
        table.add_row(
            f"{n_prompts} × {n_tokens:,}",
            f"{times['plain'] * 1e3:,.1f} ms",
            *(f"{ratio:.3f}" for ratio in ratios),
            " ".join(f"{limit:.2f}" for limit in limits) + ("" if all(within) else "  over"),
            f"{memory['plain'] / 2**20:,.0f} to {memory['trace'] / 2**20:,.0f} MiB",
        )
    if arguments.with_cache:
        tokens = some_tokens(8, 512).to(bridge.cfg.device)
        times = measure_times(variants(bridge, plain, 8, 512) | {"cache": with_cache(bridge, tokens)}, 3)
        table.add_row("8 × 512, run_with_cache", "", f"{times['cache'] / times['plain']:.3f}", "", "", "")
    Console(width=110).print(table)
    print("within the limits" if all(are_within) else "NOT within the limits")
    sys.exit(0 if all(are_within) else 1)


def embedded() -> tuple[Any, Any]:
    plain = transformers.AutoModelForCausalLM.from_pretrained(embedded_model_folder(), attn_implementation="sdpa")
    return melens.load_model("smollm2-135m"), plain


def qwen3_4b_shaped(device: str = "cuda", **other: Any) -> tuple[Any, Any]:
    """A bridge and the plain model, on the same random weights with a planted massive activation."""
    shape = QWEN3_4B | other
    bridge = melens.load_model("random", model_type="qwen3", config=shape, dtype="bfloat16", device=device)
    plain = plain_twin(bridge)
    with torch.no_grad():
        plant(plain, block=6, token=FIRST, dim=4)
    return bridge, plain


def some_tokens(n_prompts: int, n_tokens: int) -> torch.Tensor:
    tokens = torch.randint(40_000, (n_prompts, n_tokens), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = FIRST
    return tokens


def variants(bridge: Any, plain: Any, n_prompts: int, n_tokens: int) -> dict[str, Run]:
    """The plain forward pass, the trace, and the trace with ME layer and tables, over the same batches."""
    tokens = some_tokens(n_prompts, n_tokens)
    batches = tokens.to(bridge.cfg.device).split(max(1, 4096 // n_tokens))
    prompts = list(tokens)

    def with_tables() -> None:
        traced = melens.trace(bridge, prompts)
        melens.find_me_layer(traced)
        traced["norm"], traced["sink_mass"]

    return {
        "plain": lambda: [plain.model(batch, use_cache=False) for batch in batches],
        "trace": lambda: melens.trace(bridge, prompts),
        "tables": with_tables,
    }


def with_cache(bridge: Any, tokens: torch.Tensor) -> Run:
    sites = ("hook_resid_post", "ln2.hook_out", "hook_mlp_out", "attn.hook_pattern")
    names = {f"blocks.{layer}.{site}" for layer in range(bridge.cfg.n_layers) for site in sites}
    return lambda: bridge.run_with_cache(tokens, names_filter=lambda name: name in names)


def measure_times(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Time the variants in turns; the shortest of each, in seconds: what else runs on the machine only adds time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            _run(run)
            if repeat > 0:
                times[name].append(time.perf_counter() - start)
    return {name: min(of_name) for name, of_name in times.items()}


def _run(run: Run) -> None:
    with torch.no_grad():
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_allocated(run: Run) -> int:
    """GPU bytes at the peak, over what was allocated before."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _run(run)
    return torch.cuda.max_memory_allocated() - before


def peak_resident(run: Run) -> int:
    """Bytes of resident memory at the peak, over those before, of a run in a process of its own (Linux)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a thread pool does not survive a fork
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmHWM")
        _run(run)
        os.write(write, str(_status("VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(read, 64))


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
