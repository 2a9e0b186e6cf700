"""Studies made by hand: tables of a few numbers around a tiny model, so that every metric can be worked out on paper.

study = study_by_hand(me_layer=2, tables={"sink_mass": table(sink_mass=[[0.1, 0.2, ...], [0.3, 0.4, ...]], head=0)})
melens.analysis.sinks(study)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import melens
from melens.analysis.me_layer import Criterion, Emergence
from melens.analysis.study import Study
from melens.tracing.probes import Probe
from melens.tracing.trace import Trace

N_LAYERS = 7
"""Of a study made by hand: the last two blocks count apart, so that `last_before_trailing` is 4."""


class StudyByHand(Study):
    """A study whose trace holds whatever it was given, so that no probe is ever traced."""

    def traced(self, probes: Sequence[Probe]) -> Trace:
        return self.trace


def study_by_hand(
    me_layer: int | None = 2,
    *,
    born: Sequence[tuple[int, int]] | None = None,
    n_prompts: int = 2,
    first_tokens: Sequence[int] | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    n_layers: int = N_LAYERS,
    formed: int | None = None,
    **prompts: Sequence[Any],
) -> Study:
    """Make a study of a tiny Llama without a forward pass.

    Args:
        me_layer: 0-based block, or None.
        born: block (-1 for none) and position of each prompt's massive token; by default the ME layer and token 0.
        n_prompts: how many prompts there are; `born` and `first_tokens` decide where they are given.
        first_tokens: of each prompt; by default all differ.
        tables, tensors: of the trace, by probe.
        n_layers: of the model.
        formed: the block in which the massive state is formed; by default the ME layer.
        prompts: other columns of the trace's prompts, such as `task` or `n_tokens` (8 by default).
    """
    n_prompts = len(born or first_tokens or range(n_prompts))
    firsts = list(first_tokens or range(10, 10 + n_prompts))
    columns = {
        "prompt": range(n_prompts), "id": [f"p{row}" for row in range(n_prompts)], "task": None, "n_tokens": 8,
        "first_token": [str(token) for token in firsts], "first_token_id": firsts,
    }  # fmt: skip
    described = pd.DataFrame(columns | prompts)
    born = born or [(-1 if me_layer is None else me_layer, 0)] * n_prompts
    model = tiny_model(n_layers)
    description = {"name": "by hand", "n_layers": n_layers, "dtype": "float32", "d_model": model.cfg.d_model}
    trace = Trace(description, described, dict(tables or {}), dict(tensors or {}))
    tokens = [torch.tensor([first, *range(30, 29 + n)]) for first, n in zip(firsts, described["n_tokens"], strict=True)]
    formed = me_layer if formed is None else formed
    me = emergence_by_hand(me_layer, born, first_tokens=firsts, n_layers=n_layers, formed=formed)
    return StudyByHand(model, tokens, trace, me)


def emergence_by_hand(
    me_layer: int | None,
    born: Sequence[tuple[int, int]],
    *,
    first_tokens: Sequence[int],
    n_layers: int = N_LAYERS,
    **fields: Any,
) -> Emergence:
    """Make an emergence in one block, ×200 (180 to 220); `fields` replaces what else it says."""
    per_prompt = pd.DataFrame(
        [
            {"prompt": row, "layer": layer, "pos": pos, "dim": 5, "formed": layer, "formed_pos": pos}
            | {"n_massive": int(layer >= 0), "first_is_massive": layer >= 0 and pos == 0}
            for row, (layer, pos) in enumerate(born)
        ]
    )
    of_me_layer = per_prompt[per_prompt["layer"] == me_layer]
    exists = me_layer is not None
    values: dict[str, Any] = {
        "layer": me_layer,
        "reason": "Made by hand.",
        "kind": "one block" if exists else None,
        "magnification": 200.0 if exists else None,
        "magnification_interval": (180.0, 220.0) if exists else None,
        "relative_magnification": 100.0 if exists else None,
        "share_of_peak": 0.9 if exists else None,
        "share_of_peak_interval": (0.85, 0.95) if exists else None,
        "climb": (me_layer, me_layer) if exists else None,
        "formed": me_layer,
        "agreement": len(of_me_layer) / len(born),
        "prompts_with": float((per_prompt["layer"] >= 0).mean()),
        "positions": tuple(of_me_layer["pos"].value_counts().index),
        "dims": (5,) if exists else (),
        "n_layers": n_layers,
        "n_prompts": len(born),
        "distinct_first_tokens": len(set(first_tokens)),
        "criterion": Criterion(),
        "per_prompt": per_prompt,
    }
    return Emergence(**values | fields)


def table(site: str | None = None, pos: int | None = None, head: int | None = None, **values: Any) -> pd.DataFrame:
    """Lay numbers `[prompt][layer]` out as a probe's table; None leaves that prompt and layer out.

    Args:
        site, pos, head: columns that are the same in every row; None leaves the column out.
        values: the measured columns by name, of the same shape; a number stands for itself everywhere.
    """
    shape = next(value for value in values.values() if isinstance(value, Sequence))
    same = {name: value for name, value in {"site": site, "pos": pos, "head": head}.items() if value is not None}
    rows = []
    for prompt, of_prompt in enumerate(shape):
        for layer in range(len(of_prompt)):
            row = {name: v[prompt][layer] if isinstance(v, Sequence) else v for name, v in values.items()}
            if None not in row.values():
                rows.append({"prompt": prompt, "layer": layer, **same, **row})
    return pd.DataFrame(rows)


@cache
def tiny_model(n_layers: int = N_LAYERS) -> TransformerBridge:
    """Bridge a Llama of 16 dims, which tells an analysis what its blocks have and is never run."""
    config = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": n_layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return melens.load_model("random", model_type="llama", config=config, device="cpu")
