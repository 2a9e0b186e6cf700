"""What the probes of `exp=secondary` take on one long prompt, beside a trace with the default probes.

    python tests/benchmarks/secondary_cost.py          # on a GPU, a Qwen3-4B-shaped model, 1,024 to 32,768 tokens
    python tests/benchmarks/secondary_cost.py --tiny   # a tiny model on the CPU, 256 to 1,024 tokens

Exits with 1 if the peak memory over the weights more than doubles with the length (2.2 at most), as patterns would.
"""

import sys
from itertools import pairwise

from growth import TINY, measure_point, prompt_of
from trace_cost import QWEN3_4B

import melens
from melens.analysis.secondary_sinks import probes

tiny = "--tiny" in sys.argv
lengths = [256, 512, 1024] if tiny else [1024, 2048, 4096, 8192, 16_384, 32_768]
shape = (TINY if tiny else QWEN3_4B) | {"max_position_embeddings": lengths[-1]}
device, dtype = ("cpu", "float32") if tiny else ("cuda", "bfloat16")
model = melens.load_model("random", model_type="qwen3", config=shape, dtype=dtype, device=device)
ways = {
    "default": lambda tokens: melens.trace(model, [tokens], max_batch_tokens=len(tokens)),
    "secondary": lambda tokens: melens.trace(
        model, [tokens], [*melens.default_probes(model), *probes(model)], max_batch_tokens=len(tokens)
    ),
}
peaks = []
for length in lengths:
    default, secondary = measure_point(ways, prompt_of(length, shape["vocab_size"]).to(device), turns=4)
    peaks.append(secondary["bytes"])
    times, memory = secondary["seconds"] / default["seconds"], secondary["bytes"] / max(1, default["bytes"])
    print(f"{length:,} tokens: {times:.2f} × the time, {memory:.2f} × the memory")
growth = [after / before for before, after in pairwise(peaks[1:])]
sys.exit(0 if tiny or max(growth) <= 2.2 else 1)
