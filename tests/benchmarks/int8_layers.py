"""Δloss with linear layers in real int8 arithmetic (`torch._int_mm`) beside what `exp=quantization` simulates.

python tests/benchmarks/int8_layers.py [model] [cuda|cpu]  # exits with 1 where they differ by over 0.01 nats
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
linear, whole, found = [linear.module for linear in runs._linear], runs.loss(texts), {}
for kind in ("tensor", "token"):
    simulated = runs.loss(texts, Rounding(8, kind, "channel"))
    for layer in linear:
        in_int8(layer, kind)
    found[kind] = (runs.loss(texts) - whole).mean(), (simulated - whole).mean()
    print(f"one scale a {kind}: {found[kind][0]:+.4f} in int8, {found[kind][1]:+.4f} simulated", flush=True)
sys.exit(any(abs(real - simulated) > 0.01 for real, simulated in found.values()))
