"""How much arithmetic a step of training takes, and which share of a GPU's peak that is (MFU, model FLOPs utilisation).

Of a token, forward and backward: 6 for each weight that it is multiplied with, and 12 · n_heads · d_head · n_tokens in
each block for its scores and what they weigh, of all keys of the row (Chowdhery et al. 2022, PaLM, appendix B).
"""

from __future__ import annotations

from typing import Any

import torch

from melens.models.view import view_model

__all__ = ["flops_per_token", "peak_flops"]

_PEAKS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bfloat16, by NVIDIA's data sheets; of names that begin alike the longer one first."""


def flops_per_token(model: Any, n_tokens: int) -> float:
    """Return the floating point operations of a training step for a token of a row of `n_tokens`.

    Args:
        model: a transformers model. An embedding that is not the head's too is looked up, not multiplied.
        n_tokens: of a row.
    """
    weights = {id(weight): weight.numel() for weight in model.parameters()}
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if head is None or head.weight is not embedding:
        weights.pop(id(embedding), None)
    outputs: list[Any] = [block.output for block in view_model(model).blocks if block.output is not None]
    widths = [output.weight.shape[1] for output in outputs]  # n_heads · d_head
    return float(6 * sum(weights.values()) + 12 * n_tokens * sum(widths))


def peak_flops() -> float | None:
    """Return the operations a second that this process's GPU could do in bfloat16; None without one, or of another."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in _PEAKS.items() if known in name), None)
