"""What a benchmark costs next to the lm-evaluation-harness itself, in one run.

    python tests/benchmarks/benchmark_cost.py                       # questions made of Python's documentation
    python tests/benchmarks/benchmark_cost.py --data_dir my-data    # 200 items of its piqa.jsonl

The same questions, prompts and log-likelihoods on the embedded model, in turns: the harness's own model class at its
command line's default batch size and at 16, ours, and ours with a mask. Exits with 1 if ours takes more than 1.1 of the
harness's default.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate as run_harness
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from rich.table import Table

import melens
from melens.benchmarks.catalog import BENCHMARKS
from melens.benchmarks.harness import RequestOptions, evaluate
from melens.benchmarks.tasks import load_task
from melens.data.texts import read_text
from melens.models.twins import plain_twin

LIMIT = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    model = melens.load_model("smollm2-135m")
    network, tokenizer = plain_twin(model), model.tokenizer
    with tempfile.TemporaryDirectory() as made:
        task = load_task(BENCHMARKS["piqa"], options.data_dir or questions(Path(made), options.items))

    def harness(batch_size: int) -> None:
        lm = HFLM(network, tokenizer=tokenizer, batch_size=batch_size)
        run_harness(lm, {"tasks": task.tasks, "groups": {}}, limit=options.items, bootstrap_iters=0)

    def ours() -> None:
        evaluate(network, tokenizer, task, RequestOptions(), limit=options.items)

    def masked() -> None:
        with melens.WeMask(0.1, start=12).applied(network):
            ours()

    runs: dict[str, Callable[[], Any]] = {
        "harness, batch size 1 (its default)": lambda: harness(1),
        "harness, batch size 16": lambda: harness(16),
        "melens, no mask": ours,
        "melens, one mask": masked,
    }
    evaluate(network, tokenizer, task, RequestOptions(), limit=4)  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(values) for name, values in seconds.items()}
    table = Table(
        "", "time", "× harness at its default", "× harness at 16", title=f"{options.items} items of PIQA's form"
    )
    for name, taken in best.items():
        ratios = [f"{taken / best[other]:.2f}" for other in list(best)[:2]]
        table.add_row(name, f"{taken:.1f} s", *ratios)
    Console().print(table)
    default = best["harness, batch size 1 (its default)"]
    sys.exit(0 if max(best["melens, no mask"], best["melens, one mask"]) <= LIMIT * default else 1)


def questions(folder: Path, n: int) -> Path:
    """Write questions of about PIQA's lengths, made of running text."""
    words = read_text().split()
    rows = []
    for at in range(n):
        own = words[40 * at : 40 * at + 52]
        choices = [" ".join(own[10 : 20 + at % 12]), " ".join(own[30 : 40 + at % 12])]
        rows.append({"question": " ".join(own[:8]) + "?", "choices": choices, "answer": at % 2})
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


if __name__ == "__main__":
    main()
