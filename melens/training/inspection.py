"""What becomes of the massive activation and of the sinks while a model is trained.

`train` calls an `Inspector` before the first step, each `inspect_every` steps and after the last one. It traces some
prompts of the study on the weights as they are, without the training's mask and with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.me_layer import find_me_layer
from melens.analysis.metrics import SINK_THRESHOLD
from melens.analysis.sink_mass import sink_mass_by_layer
from melens.analysis.sink_rate import N_TOKENS
from melens.analysis.study import Study
from melens.masks.mask import WeMask
from melens.models.twins import bridged_twin
from melens.models.view import is_whole
from melens.storage.files import write_text
from melens.tracing.attention_probes import Importance
from melens.tracing.probes import Probe
from melens.tracing.sites import ATTENTION_ON_KEYS, Sites
from melens.tracing.trace import Trace, default_probes, trace
from melens.training.masking import GrowingMask

__all__ = ["Inspector"]


class Inspector:
    """Inspects a model in training, and keeps what it measured beside the checkpoints, for a training that resumes.

    Args:
        study: of the model before the training.
        mask: that it is trained with.
        folder: of the checkpoints.
        n_prompts: at most so many, with different first tokens.
        tokens: other prompts to look at, in place of the study's.
        resume: go on with the inspections in the folder.
    """

    def __init__(
        self,
        study: Study,
        mask: WeMask | GrowingMask | None,
        folder: Path,
        *,
        n_prompts: int = 4,
        tokens: Sequence[Int[Tensor, " pos"]] | None = None,
        resume: bool = False,
    ) -> None:
        self._study, self._mask, self._file = study, mask, folder / "looks.json"
        self._rows: list[dict[str, Any]] = []
        if resume and self._file.is_file():
            self._rows = json.loads(self._file.read_text("utf-8"))
        prompts = study.distinct_massive_prompts or study.trace.prompts["prompt"].tolist()
        self._tokens = [study.tokens[prompt] for prompt in prompts[:n_prompts]] if tokens is None else list(tokens)
        after = [] if study.me.layer is None else range(study.me.layer + 1, study.last_before_trailing + 1)
        self._layers_after = list(after) or list(range(study.n_layers))
        self._bridge: TransformerBridge | None = None

    def inspect(self, step: int, model: Any) -> None:
        """Measure the transformers model after so many optimiser steps, unless it is sharded over processes."""
        if not is_whole(model):
            return
        if self._bridge is None or not _share_weights(self._bridge, model):
            self._bridge = bridged_twin(model, self._study.trace.model["name"])
        self._rows = [row for row in self._rows if row["step"] < step]  # a training that was stopped may have gone on
        self._rows.append({"step": step, "masked": False} | self._measured(self._bridge))
        mask = None if self._mask is None else self._mask.moved_to(self._bridge)
        if mask is not None:
            with mask.applied(self._bridge):
                self._rows.append({"step": step, "masked": True} | self._measured(self._bridge))
        if PartialState().is_main_process:
            write_text(self._file, json.dumps(self._rows))

    def me_layers(self, every: int) -> list[tuple[int, int | None]]:
        """Return the ME layers without the mask at each `every` steps, those before a training was resumed included.

        Where it resumes, it is inspected in between too, and one that never stopped is not.
        """
        own = [row for row in self._rows if not row["masked"]]
        return [(row["step"], row["me_layer"]) for row in own if every and row["step"] % every == 0]

    def table(self) -> pd.DataFrame:
        """Return all inspections, as `TrainingHistory` has them."""
        columns = ["step", "masked", "me_layer", "magnification", "magnification_there", "sink_mass"]
        columns += ["largest", "largest_over_median", "sink_rate"]
        kinds: dict[str, Any] = {"step": int, "masked": bool, "me_layer": "Int64", **dict.fromkeys(columns[3:], float)}
        return pd.DataFrame(self._rows, columns=columns).astype(kinds)

    def _measured(self, bridge: TransformerBridge) -> dict[str, Any]:
        study = self._study
        probes = [*default_probes(bridge, min_abs=study.me.criterion.min_abs), *_importance(bridge)]
        found = trace(bridge, self._tokens, probes, max_batch_tokens=study.max_batch_tokens)
        me = find_me_layer(found, study.me.criterion)
        sinks = sink_mass_by_layer(found)
        return {
            "me_layer": me.layer,
            "magnification": me.magnification,
            "magnification_there": self._magnification(found),
            "sink_mass": float(sinks[sinks["layer"].isin(self._layers_after)]["mean"].mean()) if len(sinks) else None,
            **_largest(found),
            "sink_rate": _sink_rate(found),
        }

    def _magnification(self, found: Trace) -> float | None:
        """Return ‖h_out‖ / ‖h_in‖ of the massive token in the block that was the ME layer before the training."""
        layer = self._study.me.layer
        if layer is None:
            return None
        there = found["norm"].query(f"pos == {self._study.me.lifted_position}")
        norms = there.set_index(["layer", "site", "prompt"])["norm"].sort_index()
        before = (layer - 1, "hook_resid_post") if layer else (0, "hook_resid_pre")
        return float((norms.xs((layer, "hook_resid_post")) / norms.xs(before)).mean())


def _importance(bridge: TransformerBridge) -> list[Probe]:
    return [Importance(n_tokens=N_TOKENS)] if Sites.of(bridge).find(ATTENTION_ON_KEYS) else []


def _sink_rate(found: Trace) -> float | None:
    """Return the sink rate of token 0 (Gu et al. 2024); None where no prompt is long enough for it."""
    importance = found["importance"].dropna() if "importance" in found.tables else pd.DataFrame()
    return float((importance["importance"] > SINK_THRESHOLD).mean()) if len(importance) else None


def _largest(found: Trace) -> dict[str, float]:
    """Return the largest |h| of any block's output, and over the median |h| there; means over prompts."""
    by = ["prompt", "layer"]
    sizes = found["largest"].assign(size=found["largest"]["value"].abs()).groupby(by)["size"].max()
    medians = found["abs_median"].set_index(by)["abs_median"]
    ratios = (sizes / medians).groupby("prompt").max()
    return {"largest": float(sizes.groupby("prompt").max().mean()), "largest_over_median": float(ratios.mean())}


def _share_weights(bridge: TransformerBridge, model: Any) -> bool:
    """Return whether a bridge sees every step: not where adapters are merged into copies, or weights were replaced."""
    trained = {weight.data_ptr() for weight in model.parameters()}
    return all(weight.data_ptr() in trained for weight in bridge.original_model.parameters())
