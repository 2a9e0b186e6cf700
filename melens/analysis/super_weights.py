"""Super weights and massive weights of a dense FFN: found from one pass, then scaled or set to zero.

1. `scan` reads off the trace the largest input and the largest output of every block's down projection (Yu et al. 2024,
   section 3.1): where both spike, their channels are the column and the row of one entry, whose product with the input
   is compared with the output.
2. `scale` multiplies that entry, the largest other entry of the same matrix and entries drawn at random by factors.
3. `zero_rows` sets the rows of gate and up that feed the largest neurons to zero (Oh et al. 2024), all others, and as
   many at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from melens.analysis.massive_texts import MassiveTexts
from melens.analysis.study import Study
from melens.errors import MelensError
from melens.models.ffn_weights import FfnWeights, Scaling, ffn_weights, scaled
from melens.tracing.probes import LargestActivations, Probe
from melens.tracing.sites import Sites
from melens.tracing.text_runs import TextEffects, TextRuns
from melens.tracing.verification import limit_of

__all__ = ["RANDOM", "REST", "SPIKE", "TOP", "Changed", "Scalar", "SuperWeights", "probes", "scan", "spiking"]

SPIKE = 10.0
"""An input and an output spike where they are so many times their median over blocks."""

TOP, REST, RANDOM = "top rows at zero", "all other rows at zero", "as many random rows at zero"

_INPUT, _OUTPUT = "mlp.out.hook_in", "mlp.out.hook_out"
_EVERY_SIZE = 1e30
"""Over which no activation is: of a hidden state the largest entry alone is kept."""


def probes(model: Any, **options: Any) -> list[Probe]:
    """Return what `scan` reads, as far as the model has down projections that TransformerLens names."""
    sites = [site for site in (_INPUT, _OUTPUT) if Sites.of(model).find(site)]
    wanted = LargestActivations(n_tokens=1, n_dims=1, sites=sites, min_abs=_EVERY_SIZE) if sites else None
    return [wanted.named("largest_at_down")] if wanted else []


@dataclass(frozen=True)
class Scalar:
    """An entry of a block's down projection: the dim that it writes (`row`), the neuron that it reads (`column`)."""

    kind: str
    layer: int
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.kind}: block {self.layer}, row {self.row}, column {self.column}"


@dataclass(frozen=True)
class Changed:
    """A run with weights changed: of what, by which factor, and what became of the texts."""

    what: str
    factor: float | int
    effects: TextEffects


def scan(study: Study) -> pd.DataFrame:
    """Find the largest input and output of the down projections, of one prompt for each massive state.

    Returns:
        A row a prompt and block: `prompt`, `layer`, `input` and `output` (the largest |value|, with its sign), `column`
        and `row` (their channels), and `together`, whether both are of one token.
    """
    table = study.traced(probes(study.model))["largest_at_down"]
    table = table[(table["rank"] == 0) & table["prompt"].isin(study.massive_states)].set_index(["prompt", "layer"])
    read, written = (table[table["site"] == site] for site in (_INPUT, _OUTPUT))
    found = pd.DataFrame({"input": read["value"], "column": read["dim"], "output": written["value"]})
    return found.assign(row=written["dim"], together=read["pos"] == written["pos"]).reset_index()


def spiking(table: pd.DataFrame, last: int) -> pd.DataFrame:
    """Average a scan over prompts by block, and say which blocks up to `last` spike in input and output together.

    Returns:
        `layer`, the mean |input| and |output|, the most frequent `row` and `column` with the share of prompts that have
        both (`agreement`), and `spikes`.
    """
    table = table.assign(input=table["input"].abs(), output=table["output"].abs())
    rows = []
    for layer, own in table.groupby("layer"):
        row, column = own[["row", "column"]].value_counts().index[0]
        agreement = ((own["row"] == row) & (own["column"] == column) & own["together"]).mean()
        rows.append((layer, own["input"].mean(), own["output"].mean(), int(row), int(column), agreement))
    blocks = pd.DataFrame(rows, columns=["layer", "input", "output", "row", "column", "agreement"])
    before = blocks["layer"] <= last
    over = [blocks[name] >= SPIKE * blocks.loc[before, name].median() for name in ("input", "output")]
    return blocks.assign(spikes=over[0] & over[1] & before & (blocks["agreement"] > 0))


class SuperWeights:
    """The down projection of the ME layer on some texts: what it reads and writes, and runs with weights changed.

    Attributes:
        scalars: the entry of the ME layer first, then those of other blocks that spike, at most so many.
        inputs, outputs: of the ME layer's down projection, at the massive token.
        runs: of the texts.
    """

    inputs: Float[Tensor, "text neuron"]
    outputs: Float[Tensor, "text d"]

    def __init__(self, study: Study, texts: MassiveTexts, blocks: pd.DataFrame, n_scalars: int) -> None:
        """Run the texts intact.

        Raises:
            MelensError: weights that cannot be changed (`ffn_weights`).
        """
        assert study.me.layer is not None
        self._study, self.layer = study, study.me.layer
        ordered = blocks[blocks["spikes"] | (blocks["layer"] == self.layer)].sort_values("output", ascending=False)
        ordered = ordered.sort_values("layer", key=lambda layers: layers != self.layer, kind="stable")
        found = ordered.head(n_scalars).astype({"layer": int}).to_dict("records")
        self.scalars = [Scalar("super weight", each["layer"], each["row"], each["column"]) for each in found]
        self.weights = {scalar.layer: ffn_weights(study.model, scalar.layer) for scalar in self.scalars}
        self.runs = TextRuns(
            study.model, texts.tokens, texts.positions, max_batch_tokens=study.max_batch_tokens,
            starts={*self.weights},
        )  # fmt: skip
        sites = (f"blocks.{self.layer}.{site}" for site in (_INPUT, _OUTPUT))
        self.inputs, self.outputs = self.runs.read(*sites, start=self.layer)
        self._check_effect()

    @property
    def here(self) -> FfnWeights:
        """The weights of the ME layer."""
        return self.weights[self.layer]

    @cached_property
    def products(self) -> Float[Tensor, " text"]:
        """What the ME layer's scalar adds to its row, w · x."""
        scalar = self.scalars[0]
        return self.inputs[:, scalar.column] * self.here.down[scalar.column, scalar.row].float().cpu()

    def _check_effect(self) -> None:
        """Raise unless the scalar at 0 takes its product from the output: else what is run has other weights."""
        scalar = self.scalars[0]
        with scaled(Scaling(self.here.down, (scalar.column, scalar.row), 0)):
            (without,) = self.runs.read(f"blocks.{self.layer}.{_OUTPUT}", start=self.layer)
        off = (self.outputs[:, scalar.row] - without[:, scalar.row] - self.products).abs()
        limit = limit_of(self.here.down.dtype) * self.outputs.abs().amax(dim=1)
        if not bool((off <= limit).all()):
            raise MelensError(
                f"With an entry of block {self.layer}'s down projection at 0 its output changes by other than w · x, "
                f"off by {float(off.max()):.3g}: this model computes with other weights than TransformerLens shows."
            )

    def shares(self, rows: Sequence[int], columns: Sequence[int]) -> Float[Tensor, "text row column"]:
        """Divide what each column's neuron adds to each row, w · x, by the whole output there."""
        added = self.inputs[:, None, list(columns)] * self.here.down[list(columns)][:, list(rows)].T.float().cpu()
        return added / self.outputs[:, list(rows), None]

    # --- Changes ------------------------------------------------------------------------------------------------------

    def controls(self, n_random: int) -> list[Scalar]:
        """Return the largest other entry of the ME layer's down projection, and entries drawn from it by the seed."""
        scalar, (n_neurons, width) = self.scalars[0], self.here.down.shape
        sizes = self.here.down.abs().float().flatten().cpu()
        sizes[scalar.column * width + scalar.row] = -1
        drawn = np.random.default_rng(self._study.seed).choice(n_neurons * width, min(n_random + 1, n_neurons * width))
        flat = [("largest other", int(sizes.argmax()))]
        flat += [("random", int(at)) for at in drawn if at != scalar.column * width + scalar.row][:n_random]
        return [Scalar(kind, self.layer, at % width, at // width) for kind, at in flat]

    def weight_rank(self) -> int:
        """Rank the scalar's |w| among all entries of its matrix, 1 for the largest."""
        scalar, sizes = self.scalars[0], self.here.down.abs()
        return int((sizes >= sizes[scalar.column, scalar.row]).sum())

    def scaling(self, scalar: Scalar, factor: float | int) -> Scaling:
        """Return the change that multiplies a scalar."""
        return Scaling(self.weights[scalar.layer].down, (scalar.column, scalar.row), factor)

    def scale(self, scalar: Scalar, factor: float | int) -> Changed:
        """Run the texts with a scalar multiplied; a factor of 1 is the intact run."""
        if factor == 1:
            return Changed(scalar.name, factor, self.runs.intact)
        with scaled(self.scaling(scalar, factor)):
            return Changed(scalar.name, factor, self.runs.run((), scalar.layer))

    def zero_rows(self, n_rows: int, n_random: int) -> list[Changed]:
        """Set rows of gate and up to zero: those of the neurons with the largest |value|, all others, random ones.

        The neurons are ranked by their mean over texts.
        """
        largest = self.inputs.abs().mean(dim=0).argsort(descending=True)
        top, rest = largest[:n_rows], largest[n_rows:]
        generator = torch.Generator().manual_seed(self._study.seed)
        drawn = [rest[torch.randperm(len(rest), generator=generator)[:n_rows]] for _ in range(n_random)]
        changes = [(TOP, top), (REST, rest), *((RANDOM, rows) for rows in drawn)]
        return [self._without_rows(name, rows) for name, rows in changes]

    def _without_rows(self, name: str, rows: Tensor) -> Changed:
        matrices = [self.here.up] if self.here.gate is None else [self.here.gate, self.here.up]
        with scaled(*(Scaling(matrix, (slice(None), rows.to(matrix.device)), 0) for matrix in matrices)):
            return Changed(name, 0, self.runs.run((), self.layer))
