"""What experiments take on a model of the paper's largest size, Qwen2.5-32B, on one GPU or spread over several.

    python tests/benchmarks/large_model.py                     # on one GPU: 66 GB of weights, and a tenth of that free
    python tests/benchmarks/large_model.py --spread balanced   # over all GPUs, as model.device_map=balanced does
    python tests/benchmarks/large_model.py --tiny              # a tiny model on the CPU: to try this script

The weights are random, in bf16, drawn where they lie, and a massive activation is planted in them. Prints the time of
each experiment, next to one forward pass of its prompts, and each GPU's peak memory over the weights. Exits with 1 if
that is more than a tenth of the GPU's weights, or if the planted block is not found.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig
from two_gpus import BLOCK, TINY, planted_network, run_experiment

import melens
from melens.data.prompts import byte_tokenizer
from melens.models.devices import placement
from melens.models.loading import PlannedModel
from melens.models.twins import bridge_around, plain_twin

QWEN25_32B = {
    "vocab_size": 152_064, "hidden_size": 5120, "intermediate_size": 27_648, "num_hidden_layers": 64,
    "num_attention_heads": 40, "num_key_value_heads": 8, "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False,
}  # fmt: skip
LIMIT = 0.1
TOKEN = "~"
"""The massive one, first in every prompt and nowhere else."""
EXPERIMENTS = {
    "emergence": ["exp=emergence"],
    "sinks": ["exp=sinks"],
    "wemask, 9 masks": ["exp=wemask", "wemask=grid", "wemask.rate=0.1", "data.n_texts=8", "exp.keep=false"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--layers", type=int, help="blocks of the model")
    parser.add_argument("--spread", help="a device map, as model.device_map; by default one GPU")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()  # else every weight is listed as missing from its checkpoint
    transformers.utils.logging.disable_progress_bar()
    shape = (TINY | {"max_position_embeddings": 8192} if asked.tiny else QWEN25_32B) | (
        {"num_hidden_layers": asked.layers} if asked.layers else {}
    )
    start = time.perf_counter()
    model = make_model(shape, asked.spread or {"": "cpu" if asked.tiny else "cuda:0"})
    made = time.perf_counter() - start
    weights = allocated()
    within = True
    table = Table("", "seconds", *(f"over the weights, GPU {gpu}" for gpu in range(len(weights))))
    with tempfile.TemporaryDirectory() as name:
        prompts = Path(name) / "prompts.jsonl"
        texts = [TOKEN + prompt.text.replace(TOKEN, "-") for prompt in melens.load_prompts()]
        prompts.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        run("one forward pass of the prompts", partial(forward, model, texts), table)
        planned = PlannedModel("random", model.cfg, plain_twin(model), model.tokenizer, lambda: model)
        for experiment, options in EXPERIMENTS.items():
            own = ["model=random", "model.tokenizer=bytes", f"prompts.file={prompts}", *options]
            timed = partial(run_experiment, Path(name) / options[0].removeprefix("exp="), *own)
            with patch("experiments.runner.job.plan_model", lambda **_: planned):  # nothing of 66 GB lies on disk
                peaks = run(experiment, timed, table)
            within &= all(peak <= LIMIT * size for peak, size in zip(peaks, weights, strict=True))
        metrics = json.loads((Path(name) / "emergence" / "result.json").read_text())["metrics"]
    Console(width=140).print(table)
    sizes = ", ".join(f"{size / 2**30:.1f} GiB" for size in weights)
    print(f"weights: {sizes}, {placement(model.original_model)}; drawn in {made:.0f} s; {len(texts)} prompts")
    print(f"ME layer {metrics['me_layer']}; over the weights at most {LIMIT:.0%} of them: {within}")
    sys.exit(0 if within and metrics["me_layer"] == min(BLOCK, shape["num_hidden_layers"] - 2) else 1)


def make_model(shape: dict[str, Any], device_map: Any) -> Any:
    config = AutoConfig.for_model("qwen3" if shape["vocab_size"] == TINY["vocab_size"] else "qwen2", **shape)
    model = bridge_around(planted_network(config, TOKEN, device_map), "Qwen2.5-32B-shaped")
    model.tokenizer = byte_tokenizer()
    return model


def forward(model: Any, texts: list[str]) -> float:
    """Run transformers' own model over the prompts, one by one; return the seconds."""
    network = plain_twin(model)
    device = network.get_input_embeddings().weight.device
    prompts = [torch.tensor([model.tokenizer(text)["input_ids"]], device=device) for text in texts]
    start = time.perf_counter()
    with torch.no_grad():
        for tokens in prompts:
            network.base_model(tokens, use_cache=False)
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.synchronize(gpu)
    return time.perf_counter() - start


def allocated() -> list[int]:
    """Return the bytes that lie on each GPU of this process."""
    gc.collect()
    return [torch.cuda.memory_allocated(gpu) for gpu in range(torch.cuda.device_count())]


def run(name: str, timed: Callable[[], float], table: Table) -> list[int]:
    """Add a row with the seconds that it returns; return the bytes at each GPU's peak over those before."""
    before = allocated()
    for gpu in range(len(before)):
        torch.cuda.reset_peak_memory_stats(gpu)
    seconds = timed()
    peaks = [torch.cuda.max_memory_allocated(gpu) - size for gpu, size in enumerate(before)]
    table.add_row(name, f"{seconds:.1f}", *(f"{peak / 2**30:.2f} GiB" for peak in peaks))
    return peaks


if __name__ == "__main__":
    main()
