"""What WeMask costs in training: the time of a step of SFT and, on a GPU, the peak memory, next to no mask, in one run.

    python tests/benchmarks/training_cost.py        # the embedded model on the CPU; on a GPU a Qwen3-4B-shaped model

All weights in float32, bfloat16 arithmetic on a GPU, gradient checkpointing, rows of one length. Trainings with a mask
and without take turns; the shortest step of one over the shortest of the other, as what else runs only adds time. Exits
with 1 over the limit.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from trace_cost import QWEN3_4B

from melens import WeMask
from melens.data.prompts import byte_tokenizer
from melens.models.loading import embedded_model_folder
from melens.training.recipe import Recipe
from melens.training.trainers import train

LIMIT = 1.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=4, help="of each")
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    if on_gpu:
        config = transformers.AutoConfig.for_model("qwen3", **QWEN3_4B)
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        name, (n_rows, n_tokens), start = "Qwen3-4B-shaped, GPU", (8, 1024), 8
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(embedded_model_folder())
        name, (n_rows, n_tokens), start = "SmolLM2-135M, CPU", (2, 128), 12
    ids = torch.randint(200, (n_rows * options.steps, n_tokens), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids.tolist()})
    recipe = Recipe(
        "sft",
        batch_size=n_rows,
        micro_batch_size=n_rows,
        lr=1e-6,
        steps=options.steps,
        precision="mixed" if on_gpu else "float32",
        gradient_checkpointing=True,
        save_every=0,
    )
    mask = WeMask(rate=0.1, start=start)
    seconds: dict[str, list[float]] = {"no mask": [], "WeMask": []}
    memory: dict[str, float] = {}
    for turn in range(2 * options.turns):
        which = ("no mask", "WeMask", "WeMask", "no mask")[turn % 4]
        ends: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            settled = mask.on(model) if which == "WeMask" else None
            watch = {"progress": lambda done, total, ends=ends: ends.append(time.perf_counter())}
            trained = train(model, byte_tokenizer(), rows, recipe, Path(folder), mask=settled, **watch)
        seconds[which] += [after - before for before, after in itertools.pairwise(ends)]
        memory[which] = max(memory.get(which, 0), trained.stats.peak_gb or 0)
        del trained
        gc.collect()  # the optimiser
    table = Table("", "a step", "× without", "peak memory", "× without", title=f"{name}, {n_rows} x {n_tokens} tokens")
    ratios = {"time": min(seconds["WeMask"]) / min(seconds["no mask"])}
    if on_gpu:
        ratios["memory"] = memory["WeMask"] / memory["no mask"]
    for which in seconds:
        shown = [f"{ratio:.4f}" if which == "WeMask" else "" for ratio in ratios.values()]
        peak = [f"{memory[which]:.2f} GB"] if on_gpu else []
        table.add_row(which, f"{min(seconds[which]):.3f} s", shown[0], *peak, *shown[1:])
    Console().print(table)
    sys.exit(1 if max(ratios.values()) > LIMIT else 0)


if __name__ == "__main__":
    main()
