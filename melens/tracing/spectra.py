"""Probes of ranks: how many directions hidden states and attention matrices span (section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float
from torch import Tensor

from melens.analysis.metrics import effective_rank, first_share, matrix_entropy
from melens.tracing.probes import Batch, Probe
from melens.validation.signatures import SiteList, checked
from melens.validation.types import Count

__all__ = ["AttentionSpectrum", "Spectrum"]


class Spectrum(Probe):
    """How many directions a prompt's tokens span in a site's `[pos, d]`, by block (section 6).

    The columns are `effective_rank`, `first_share` and `matrix_entropy` of the states as they are, and the same with
    `_without_first`, without token 0, and with `_unit_rows`, of each token's direction alone: a single row of enormous
    norm makes any spectrum low-rank. Ranks grow with the number of tokens: only prompts of one length can be compared.
    With `n_tokens` only the first so many tokens of a prompt count, and prompts of fewer have NaN.

    Two more tell how much that is: `row_share`, token 0's ‖x_0‖² / ‖X‖², and `aligned_share`, ‖X x_0‖² / (‖x_0‖² ‖X‖²),
    the energy along its direction. No σ_1² / Σσ² is less (theorem 1 of Queipo-de-Llano et al. 2025, who write it
    (M + αR) / (M + R)).

    Example:
        >>> spectrum = melens.trace(model, prompts, melens.Spectrum())["spectrum"]
        >>> after = spectrum[spectrum["layer"] == 2].mean(numeric_only=True)
        >>> bool(after["first_share"] > after["first_share_without_first"])  # token 0's outweighs
        True
    """

    name = "spectrum"

    @checked
    def __init__(self, sites: SiteList = ("hook_resid_post",), n_tokens: Count | None = None):
        self.sites, self.n_tokens = tuple(sites), n_tokens

    def reduce(self, activation: Float[Tensor, "batch pos d"], batch: Batch) -> dict[str, Tensor]:
        if self.n_tokens is None:
            return self._of_states(activation, batch.lengths)
        is_long = [length >= self.n_tokens for length in batch.lengths]
        kept = torch.tensor(is_long, device=activation.device)
        if not any(is_long):
            return {name: activation.new_full((len(kept),), float("nan"), dtype=torch.float32) for name in _COLUMNS}
        found = self._of_states(activation[kept], [self.n_tokens] * sum(is_long))
        spread = {name: values.new_full((len(kept),), float("nan")) for name, values in found.items()}
        for name, values in found.items():
            spread[name][kept.to(values.device)] = values
        return spread

    def _of_states(self, activation: Float[Tensor, "batch pos d"], lengths: Sequence[int]) -> dict[str, Tensor]:
        states = [hidden[:length].double() for hidden, length in zip(activation, lengths, strict=True)]
        variants = {
            "": states,
            "_without_first": [of_prompt[1:] for of_prompt in states],
            "_unit_rows": [torch.nn.functional.normalize(of_prompt, dim=-1) for of_prompt in states],
        }
        ranks = {
            f"{name}{suffix}": values
            for suffix, matrices in variants.items()
            for name, values in _ranks(matrices).items()
        }
        energy = torch.stack([of_prompt.square().sum() for of_prompt in states])
        first = [torch.nn.functional.normalize(of_prompt[0], dim=-1) for of_prompt in states]
        shares = {
            "row_share": torch.stack([of_prompt[0].square().sum() for of_prompt in states]),
            "aligned_share": torch.stack([(rows @ x).square().sum() for rows, x in zip(states, first, strict=True)]),
        }
        return ranks | {name: (of_energy / energy).float() for name, of_energy in shares.items()}


_RANKS = ("effective_rank", "first_share", "matrix_entropy")
_VARIANTS = ("", "_without_first", "_unit_rows")
_COLUMNS = (*(f"{name}{suffix}" for suffix in _VARIANTS for name in _RANKS), "row_share", "aligned_share")
"""Of `Spectrum`."""


class AttentionSpectrum(Probe):
    """Ranks of the attention matrices `[query, key]`, by block and head (section 6).

    The columns are `effective_rank` (from 1 to the number of tokens), `first_share` and `matrix_entropy` (both from 0
    to 1), as of `Spectrum`. The pattern takes memory quadratic in the length.

    Example:
        >>> spectrum = melens.trace(model, prompts, melens.AttentionSpectrum())["attention_spectrum"]
        >>> spectrum.columns.tolist()
        ['prompt', 'layer', 'site', 'head', 'effective_rank', 'first_share', 'matrix_entropy']
    """

    name = "attention_spectrum"
    sites = ("attn.hook_pattern",)
    index = ("head",)

    def reduce(self, activation: Float[Tensor, "batch head query key"], batch: Batch) -> dict[str, Tensor]:
        rows = zip(activation, batch.lengths, strict=True)
        return _ranks([pattern[:, :length, :length] for pattern, length in rows])


def _ranks(matrices: Sequence[Tensor]) -> dict[str, Tensor]:
    """Compute ranks of `[*head, row, column]` by the Gram matrix: in float64, as the first may be 10,000 × another."""
    values = []
    for matrix in matrices:
        rows = matrix.double() if matrix.shape[-2] <= matrix.shape[-1] else matrix.double().mT
        values.append(_eigenvalues(rows @ rows.mT).clamp(min=0).sqrt().float())
    ranks = {"effective_rank": effective_rank, "first_share": first_share, "matrix_entropy": matrix_entropy}
    return {name: torch.stack(list(map(rank, values))) for name, rank in ranks.items()}


def _eigenvalues(symmetric: Float[Tensor, "*head n n"]) -> Float[Tensor, "*head n"]:
    """Compute eigenvalues on the CPU, a thread a share of the matrices.

    A GPU takes small matrices of float64 one after the other, seven times as long; so does a CPU that has all its
    threads work on one.
    """
    n_threads, matrices = torch.get_num_threads(), symmetric.flatten(0, -3).cpu() if symmetric.ndim > 2 else None
    if matrices is None or n_threads == 1:
        return torch.linalg.eigvalsh(symmetric.cpu()).to(symmetric.device)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            found = torch.cat(list(pool.map(torch.linalg.eigvalsh, matrices.chunk(n_threads))))
    finally:
        torch.set_num_threads(n_threads)
    return found.view(symmetric.shape[:-1]).to(symmetric.device)
