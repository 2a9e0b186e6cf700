"""Loss beyond the context trained on, under sliding caches, on a GPU: what 32,768 tokens cost in time and memory.

python tests/benchmarks/long_cache.py smollm2-135m --n-tokens 32768 --cache 1024 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console

import melens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--n-tokens", type=int, default=32_768)
    parser.add_argument("--cache", type=int, default=1_024)
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    console = Console(width=120)
    model = melens.load_model(asked.model, dtype=asked.dtype)
    study = melens.study(model, melens.load_prompts())
    begin = time.perf_counter()
    result = melens.analysis.eviction(study, cache=asked.cache, n_texts=3, n_tokens=asked.n_tokens, needles=20)
    console.print(result)
    console.print(result.claims[["id", "value", "low", "high", "verdict"]].to_string())
    points = result.tables["loss_by_position"].query("draw == 0")
    by_position = points.pivot_table(index="position", columns=["masked", "policy"], values="loss")
    console.print(by_position.iloc[:: max(1, len(by_position) // 16)].round(3).to_string())
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")
    console.print(f"{time.perf_counter() - begin:.0f} s, at most {peak:.1f} GiB on the GPU.")


if __name__ == "__main__":
    main()
