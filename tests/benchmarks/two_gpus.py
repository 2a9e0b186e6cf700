"""Every experiment on a model that is spread over devices, next to the same model on one GPU.

    python tests/benchmarks/two_gpus.py             # a Qwen3-4B-shaped model in bf16, with a planted massive activation
    python tests/benchmarks/two_gpus.py --tiny      # on the CPU, with a part on disk: to try this script

The model is `balanced` over the GPUs, then half of it is left in the CPU's memory. Prints the largest relative
difference of each experiment's metrics and tables to what one GPU gives. Exits with 1 if one is over the limit, or a
training of the spread model is not refused.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from trace_cost import QWEN3_4B
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from planted import plant  # noqa: E402

from experiments.options import compose_options  # noqa: E402
from experiments.runner.job import run_job  # noqa: E402
from melens import MelensError  # noqa: E402
from melens.data.prompts import byte_tokenizer  # noqa: E402

LIMIT = 1e-2  # bf16, where the GPUs take the same kernels
TINY = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
BLOCK, DIM = 3, 21
TEXTS = [
    "The key is under the mat, where it was left last night by whoever came home late.",
    "That dog likes rain; it sits in the garden until somebody calls it back to the house.",
    "Three and four are seven, and seven and five are twelve, as every child soon learns.",
    "Take the second road on the left, then walk along the river until you see the mill.",
    "To build a boat you need wood, nails, patience, and a shed that is larger than the boat.",
    "Tomorrow the library opens at nine; today it was closed, since the heating had failed.",
]
EXPERIMENTS = {
    "all": ["exp=all", "exp.sinks.rank_tokens=32"],
    "wemask": ["exp=wemask", "exp.keep=false", "wemask.rate=0.1", "data.n_texts=8"],
    "generate": ["exp=generate", "generate.max_new_tokens=16"],
    "benchmark": [
        "exp=benchmark", "exp.keep=false", "benchmark.limit=8",
        "benchmark.tasks=[perplexity,induction,copy,needle]", "benchmark.masks=[off,paper]",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--layers", type=int, help="blocks of the model")
    parser.add_argument("--only", choices=["balanced", "offloaded"], help="one way to spread the model")
    asked = parser.parse_args()
    if not asked.tiny and torch.cuda.device_count() < 2:
        sys.exit("There are fewer than two GPUs: --tiny tries this script on the CPU.")
    shape = (TINY if asked.tiny else QWEN3_4B) | ({"num_hidden_layers": asked.layers} if asked.layers else {})
    table = Table("model", "experiment", "largest difference", "where", "seconds", "on one device")
    within = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_model(folder / "model", shape, on_gpu=not asked.tiny)
        (folder / "prompts.txt").write_text("\n".join(TEXTS))
        for placement, options in placements(size, tiny=asked.tiny).items():
            if asked.only in (None, placement):
                within.append(is_training_refused(folder, options))
                for experiment in EXPERIMENTS:
                    within.append(compare(folder, experiment, placement, options, table, tiny=asked.tiny))
    Console(width=160).print(table)
    print(f"a training of the spread model is refused, and all differences are within {LIMIT:g}: {all(within)}")
    sys.exit(not all(within))


def placements(size: int, *, tiny: bool) -> dict[str, list[str]]:
    """Return options of the node `model` by a name for them; half of a model's bytes are `size / 2`."""
    if tiny:
        return {"offloaded": [f"model.max_memory={{cpu:{size // 2}}}"]}
    offloaded = f"model.max_memory={{0:{size // 2},cpu:{2 * size}}}"
    return {"balanced": ["model.device_map=balanced"], "offloaded": [offloaded]}


def make_model(folder: Path, shape: dict[str, Any], *, on_gpu: bool) -> int:
    """Save a random model whose block 3 makes the texts' first token massive; return its size in bytes."""
    config = AutoConfig.for_model("qwen3", **shape)
    network = planted_network(config, "T", {"": "cuda:0" if on_gpu else "cpu"})
    network.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    size = sum(weight.nbytes for weight in network.parameters())
    del network
    if on_gpu:
        torch.cuda.empty_cache()
    return size


def planted_network(config: Any, token: str, device_map: Any) -> Any:
    """Make a random model where its weights are to lie, in bf16 on GPUs, with a block that makes a byte massive."""
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    torch.manual_seed(0)
    # A checkpoint without a single weight: transformers draws what is missing, each on the device of its module.
    network = kind.from_pretrained(
        None, config=config, state_dict={}, device_map=device_map, attn_implementation="eager",
        dtype=torch.float32 if device_map == {"": "cpu"} else torch.bfloat16,
    )  # fmt: skip
    for name, weight in network.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)  # else no gain tells from another
    block = min(BLOCK, len(network.model.layers) - 2)
    plant(network, block=block, token=byte_tokenizer()(token)["input_ids"][0], dim=DIM)
    return network


def job(folder: Path, run: str, *options: str) -> tuple[Path, float]:
    """Run an experiment on the saved model; return where its result is, and how long it took."""
    own = ["model=hub", f"model.name={folder / 'model'}", f"prompts.file={folder / 'prompts.txt'}"]
    return folder / run, run_experiment(folder / run, *own, *options)


def run_experiment(folder: Path, *options: str) -> float:
    """Run an experiment as the command line does, with its result in a folder; return the seconds that it took."""
    folder.mkdir(exist_ok=True)
    cfg = compose_options(*options)
    start = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        failed = run_job(cfg, folder)
    if failed:
        sys.exit(f"{folder.name}: {', '.join(failed)} failed.")
    return time.perf_counter() - start


def is_training_refused(folder: Path, options: list[str]) -> bool:
    try:
        job(folder, "sft", "scale=smoke", "exp=sft", "training.dataset=sums", *options)
    except MelensError as error:
        print(error)
        return True
    return False


def compare(folder: Path, experiment: str, placement: str, options: list[str], table: Table, *, tiny: bool) -> bool:
    """Run an experiment on the spread model, and on one device unless it was; add a row, and tell if they agree."""
    alone = folder / f"{experiment}-whole"
    seconds = 0.0
    if not alone.exists():
        device = "model.device=cpu" if tiny else "model.device=cuda:0"
        alone, seconds = job(folder, alone.name, *EXPERIMENTS[experiment], device)
    spread, of_spread = job(folder, f"{experiment}-{placement}", *EXPERIMENTS[experiment], *options)
    where, difference = max(differences(spread, alone), key=lambda found: found[1], default=("nothing", 0.0))
    lies = json.loads((spread / "result.json").read_text())["model"]["placement"]
    where_it_lies = f"{placement} {lies}"
    times = [f"{of_spread:.0f}", f"{seconds:.0f}" if seconds else ""]
    table.add_row(where_it_lies, experiment, f"{difference:.1e}", where, *times)
    return difference <= LIMIT and len(lies) > 1


def differences(spread: Path, alone: Path) -> Iterator[tuple[str, float]]:
    """Compare two results: their metrics each relative to its own size, tables relative to a column's largest value."""
    metrics = [json.loads((run / "result.json").read_text())["metrics"] for run in (spread, alone)]
    yield from _of_metrics("", *metrics)
    for file in sorted(alone.glob("*.parquet")):
        tables = [pd.read_parquet(run / file.name) for run in (spread, alone)]
        if tables[0].shape != tables[1].shape:
            yield file.stem, float("inf")
            continue
        for column in tables[1].select_dtypes("number"):
            found, expected = (table[column].to_numpy(dtype=float, na_value=np.nan) for table in tables)
            scale = np.nanmax(np.abs(expected), initial=1e-6)
            is_missing = np.isnan(found) != np.isnan(expected)
            largest = float("inf") if is_missing.any() else np.nanmax(np.abs(found - expected), initial=0) / scale
            yield f"{file.stem}.{column}", float(largest)


def _of_metrics(name: str, found: Any, expected: Any) -> Iterator[tuple[str, float]]:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            if key != "seconds":
                yield from _of_metrics(f"{name}.{key}".strip("."), found.get(key), expected.get(key))
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, pair in enumerate(zip(found, expected, strict=True)):
            yield from _of_metrics(f"{name}[{number}]", *pair)
    elif isinstance(expected, float) and isinstance(found, float):
        yield name, abs(found - expected) / max(abs(found), abs(expected), 1e-6)
    else:
        yield name, 0.0 if found == expected else float("inf")


if __name__ == "__main__":
    main()
