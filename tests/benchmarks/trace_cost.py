"""What a trace costs next to the plain forward pass and to `run_with_cache`, in one run.

    python tests/benchmarks/trace_cost.py            # the embedded model on the CPU; on a GPU a Qwen3-4B-shaped model

Prints a table of times, peak memory over the weights, and their ratios to the plain forward pass. Exits with 1 if a
ratio is over its limit.
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

import melens
from melens.models.loading import embedded_model_folder

QWEN3_4B = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True,
}  # fmt: skip

Run = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    within = gpu(repeats) if torch.cuda.is_available() else cpu(repeats)
    sys.exit(0 if within else 1)


def cpu(repeats: int) -> bool:
    """8 prompts of 512 tokens on the embedded model: at most 1.15 × plain, 1.5 × faster than the cache, +64 MiB."""
    bridge = melens.load_model("smollm2-135m")
    plain = transformers.AutoModelForCausalLM.from_pretrained(embedded_model_folder(), attn_implementation="sdpa")
    tokens = torch.randint(40_000, (8, 512), generator=torch.Generator().manual_seed(0))
    runs = variants(bridge, plain, tokens)
    times = measure_times(runs, repeats)
    memory = {name: peak_resident(run) for name, run in runs.items()}
    report("8 x 512 tokens, SmolLM2-135M, fp32, CPU", times, memory)
    return within(
        times["trace, all probes"] / times["plain forward"] <= 1.15,
        times["run_with_cache"] / times["trace, all probes"] >= 1.5,
        memory["trace, all probes"] - memory["plain forward"] <= 64 * 2**20,
    )


def gpu(repeats: int) -> bool:
    """4,096 tokens: at most 1.10 × plain and +0.5 GiB; the sink map of 32,768 tokens: at most 1.25 × plain."""
    device = torch.device("cuda")
    options: dict[str, Any] = {"model_type": "qwen3", "config": QWEN3_4B, "dtype": "bfloat16", "device": "cuda"}
    bridge = melens.load_model("random", **options)
    config = transformers.AutoConfig.for_model("qwen3", **QWEN3_4B)
    with device:
        plain = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    tokens = torch.randint(150_000, (1, 4096), generator=torch.Generator().manual_seed(0))
    runs = variants(bridge, plain, tokens.to(device))
    times = measure_times(runs, repeats)
    memory = {name: peak_allocated(run) for name, run in runs.items()}
    where = f"Qwen3-4B-shaped, bf16, {torch.cuda.get_device_name()}"
    report(f"4,096 tokens, {where}", times, memory)
    long = torch.randint(150_000, (1, 32_768), generator=torch.Generator().manual_seed(1)).to(device)
    sinks = [melens.SinkMass(), melens.SinkByQuery()]
    long_runs: dict[str, Run] = {
        "plain forward": lambda: plain.model(long, use_cache=False),
        "trace, sink map": lambda: melens.trace(bridge, list(long), sinks, max_batch_tokens=long.numel()),
    }
    long_times = measure_times(long_runs, max(2, repeats // 2))
    long_memory = {name: peak_allocated(run) for name, run in long_runs.items()}
    report(f"32,768 tokens, {where}", long_times, long_memory)
    return within(
        times["trace, all probes"] / times["plain forward"] <= 1.10,
        memory["trace, all probes"] - memory["plain forward"] <= 0.5 * 2**30,
        long_times["trace, sink map"] / long_times["plain forward"] <= 1.25,
    )


def variants(bridge: Any, plain: Any, tokens: torch.Tensor) -> dict[str, Run]:
    sites = ("hook_resid_post", "ln2.hook_out", "hook_mlp_out", "attn.hook_pattern")
    names = {f"blocks.{layer}.{site}" for layer in range(bridge.cfg.n_layers) for site in sites}
    return {
        "plain forward": lambda: plain.model(tokens, use_cache=False),
        "trace, all probes": lambda: melens.trace(bridge, list(tokens), max_batch_tokens=tokens.numel()),
        "run_with_cache": lambda: bridge.run_with_cache(tokens, names_filter=lambda name: name in names),
    }


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


def report(title: str, times: dict[str, float], memory: dict[str, int]) -> None:
    table = Table("", "time", "x plain", "peak memory", "over plain", title=title)
    for name, seconds in times.items():
        over = (memory[name] - memory["plain forward"]) / 2**20
        ratio = seconds / times["plain forward"]
        table.add_row(name, f"{seconds:.3f} s", f"{ratio:.2f}", f"{memory[name] / 2**20:,.0f} MiB", f"{over:+,.0f} MiB")
    Console(width=110).print(table)


def within(*limits: bool) -> bool:
    print("within the limits" if all(limits) else f"NOT within the limits: {limits}")
    return all(limits)


if __name__ == "__main__":
    main()
