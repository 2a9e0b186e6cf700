"""Super experts of a mixture (Su et al. 2025): found by the largest outputs of all experts, then taken out.

1. Each text runs once; every expert that a token goes to is called again by itself, which gives the output of its
   down projection before the router's weight. The weighted sum of these must be what the block's experts wrote.
2. An expert is super if its largest |output| is over the 99.5% quantile of all experts' and over a tenth of the
   largest, in a block that takes part in making the massive activation: up to where it is formed.
3. `SuperExperts.without` runs the texts with experts that write nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from melens.analysis.massive_texts import MassiveTexts
from melens.analysis.study import Study
from melens.analysis.super_weights import Changed
from melens.errors import MelensError
from melens.models.devices import input_device
from melens.models.ffn_weights import experts_of, scaled, without_expert
from melens.models.view import base_of
from melens.tracing.text_runs import TextRuns
from melens.tracing.twin import running
from melens.tracing.verification import limit_of

__all__ = ["SuperExperts", "largest_outputs", "mark_super"]

QUANTILE, OF_LARGEST = 0.995, 0.1
"""Su et al. (2025), section 3: over that quantile of all experts' largest outputs, and that part of the largest."""


@torch.no_grad()
def largest_outputs(study: Study, texts: MassiveTexts) -> pd.DataFrame:
    """Measure the largest |output| of every expert's down projection over all tokens of the texts.

    Returns:
        A row an expert: `layer`, `expert`, `largest` (0 where no token goes to it).

    Raises:
        MelensError: experts whose outputs do not add up to what their block computes.
    """
    modules = {layer: experts_of(study.model, layer) for layer in range(study.n_layers)}
    found = {
        layer: torch.zeros(experts.get_parameter("down_proj").shape[0])
        for layer, experts in modules.items()
        if experts is not None
    }
    with running(study.model) as network, ExitStack() as stack:
        for layer, largest in found.items():
            module: Any = modules[layer]
            hook = partial(_keep_largest, layer, largest)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for ids in texts.tokens:
            base_of(network)(input_ids=ids[None].to(input_device(study.model.original_model)), use_cache=False)
    of_all = [(layer, expert, value) for layer, own in found.items() for expert, value in enumerate(own.tolist())]
    return pd.DataFrame(of_all, columns=["layer", "expert", "largest"])


def _keep_largest(layer: int, largest: Tensor, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
    """Call each expert by itself, on the tokens that go to it, and raise where that is not what was computed."""
    hidden, index, weights = (*args, *kwargs.values())[:3]
    hidden, total = hidden.reshape(-1, hidden.shape[-1]), torch.zeros_like(hidden, dtype=torch.float32)
    total = total.reshape(hidden.shape)
    for expert in index.unique().tolist():
        tokens, places = torch.where(index == expert)
        alone = torch.full((len(tokens), 1), expert, dtype=index.dtype, device=index.device)
        ones = torch.ones(alone.shape, dtype=weights.dtype, device=weights.device)
        own = type(module).forward(module, hidden[tokens], alone, ones).float()
        largest[expert] = max(float(largest[expert]), float(own.abs().max()))
        total.index_add_(0, tokens, own * weights[tokens, places, None].float())
    off, size = (total - output.reshape(total.shape)).abs().max(), output.abs().max()
    if not bool(off <= limit_of(hidden.dtype) * size):
        raise MelensError(
            f"The experts of block {layer}, called one by one, do not add up to what they compute together (off by "
            f"{float(off):.3g} of {float(size):.3g}), so none can be measured apart."
        )


def mark_super(outputs: pd.DataFrame, last: int) -> pd.Series[bool]:
    """Tell which experts are super, of blocks up to `last`."""
    largest = outputs["largest"]
    is_large = (largest > largest.quantile(QUANTILE)) & (largest > OF_LARGEST * largest.max())
    return is_large & (outputs["layer"] <= last)


class SuperExperts:
    """The experts of a mixture on some texts, and runs without some of them.

    Attributes:
        outputs: as of `largest_outputs`, with `is_super`.
        chosen: the super experts, as pairs of block and number.
        runs: of the texts.
    """

    def __init__(self, study: Study, texts: MassiveTexts) -> None:
        """Measure every expert, and run the texts intact.

        Raises:
            MelensError: as `largest_outputs`.
        """
        assert study.me.formed is not None
        self._study, self._last = study, study.me.formed
        outputs = largest_outputs(study, texts)
        self.outputs = outputs.assign(is_super=mark_super(outputs, self._last))
        self.chosen = self._pairs(self.outputs["is_super"])
        first = min((layer for layer, _ in self._pairs(self.outputs["layer"] <= self._last)), default=0)
        self._start = first
        self.runs = TextRuns(
            study.model, texts.tokens, texts.positions, max_batch_tokens=study.max_batch_tokens, starts=[first]
        )

    def _pairs(self, where: pd.Series[bool]) -> list[tuple[int, int]]:
        own = self.outputs[where]
        return list(zip(own["layer"].tolist(), own["expert"].tolist(), strict=True))

    def random(self, n_random: int) -> list[list[tuple[int, int]]]:
        """Draw as many other experts by the study's seed, several times, from the blocks where one may be super."""
        others = self._pairs(~self.outputs["is_super"] & (self.outputs["layer"] <= self._last))
        generator = np.random.default_rng(self._study.seed)
        n = min(len(self.chosen), len(others))
        return [[others[at] for at in generator.choice(len(others), n, replace=False)] for _ in range(n_random)]

    def without(self, name: str, experts: Sequence[tuple[int, int]]) -> Changed:
        """Run the texts with experts that write nothing."""
        changes = [change for layer, expert in experts for change in without_expert(self._study.model, layer, expert)]
        with scaled(*changes):
            return Changed(name, 0, self.runs.run((), self._start))
