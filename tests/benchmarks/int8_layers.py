"""Δloss with linear layers in real int8 arithmetic (`torch._int_mm`) beside what `exp=quantization` simulates.

python tests/benchmarks/int8_layers.py [model] [cuda|cpu]  # exits with 1 where they differ by over 0.05 nats
"""

import sys

import torch
from torch import Tensor, nn

import melens
from melens.data.texts import cut_texts, read_text
from melens.tracing.rounding import MarkedTexts, RoundedRuns, Rounding


def in_int8(layer: nn.Linear, kind: str) -> None:
    """Let a layer multiply int8 by int8 into int32: a scale for each output, and for a text or each of its tokens."""
    of_weight = layer.weight.float().abs().amax(1, keepdim=True) / 127
    weight = (layer.weight / of_weight).round().to(torch.int8).T

    def forward(entering: Tensor) -> Tensor:
        own = entering[0].float()
        scale = (own.abs().amax(1, keepdim=True) if kind == "token" else own.abs().amax()) / 127
        product = torch._int_mm((own / scale).round().to(torch.int8), weight) * scale * of_weight.T
        return (product if layer.bias is None else product + layer.bias).to(entering.dtype)[None]

    layer.forward = forward  # type: ignore[method-assign]


model = melens.load_model(*sys.argv[1:2] or ["smollm2-135m"], device=(sys.argv[2:3] or ["auto"])[0])
tokens = cut_texts(model, read_text(), n_texts=12, n_tokens=64)
is_counted = torch.ones_like(tokens, dtype=torch.bool).index_fill(1, torch.tensor([0, 63]), False)
runs, texts = RoundedRuns(model, texts_per_batch=1), MarkedTexts(tokens, ~is_counted, is_counted)
whole = runs.loss(texts)
simulated = {kind: (runs.loss(texts, Rounding(8, kind, "channel")) - whole).mean() for kind in ("tensor", "token")}
worst, layers = 0.0, [linear.module for linear in runs._linear]
for kind, rise in simulated.items():
    for layer in layers:
        in_int8(layer, kind)
    real = (runs.loss(texts) - whole).mean()
    worst = max(worst, float(abs(real - rise)))
    print(f"one scale a {kind}: {real:+.4f} in int8, {rise:+.4f} simulated", flush=True)
sys.exit(worst > 0.05)
