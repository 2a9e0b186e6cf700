"""Check a kind of model on the spot: do the ways that melens takes give transformers' own numbers?

A trace runs a bridge without its components (`melens.tracing.twin`), with fused attention, on prompts that share a
forward pass. Each of these rests on how a library is made inside, and a library or an architecture that nobody tried
may differ without an error. So the first trace of a kind of model (class, config, precision, library versions, sites)
is preceded by a check:

1. Two prompts of unequal length run alone through plain transformers modules on the same weights, in eager attention.
   Each site is read at the module where its tensor passes, attention from `output_attentions`.
2. Where the kind of component does not say whether the tensor of a hook point passes there, the bridge runs once to
   tell.
3. The same prompts run the fast way, in one batch if they may share one.
4. Where the two differ, the prompts run alone, then through the bridge as TransformerLens made it. The first way that
   agrees is taken from then on, and a warning says so; if none does, the model is refused.

The answer is kept in the user's cache.

    melens.verify(model).errors  # a row for each site and block: site, layer, error, limit
"""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from melens.errors import MelensError
from melens.models.attention_kinds import kind_of
from melens.models.devices import input_device
from melens.models.twins import bridge_around, twin_of
from melens.models.view import base_of, view_model
from melens.printing import Summary
from melens.storage.cache import Store, store_for_kind
from melens.tracing.attended import Attended, FromPattern
from melens.tracing.attention import pattern_of
from melens.tracing.batching import BatchRule, forget_longest, measured, rule_of
from melens.tracing.sites import ATTENTION_BY_KEY, ATTENTION_ON_KEYS, Sites
from melens.tracing.twin import Place, Twin, Way, running
from melens.validation.arguments import Bridge
from melens.validation.signatures import SiteList, checked

__all__ = ["Verification", "is_reduced", "limit_of", "two_prompts", "verified", "verify"]

_ROUNDINGS, _REROUTED = 4, 0.3

_ANOTHER = 0.3
"""From which relative error on two tensors are not the same one, computed in two ways."""

_SHORT, _LONG, _FAR = 9, 24, 512
"""Tokens of the two prompts, the longer one `_SHORT` beyond a window or chunk of up to `_FAR` tokens."""


_Where = tuple[str, int]
"""A site and its block, -1 for none."""

_Tokens = Int[Tensor, " _"]
"""Token ids of one prompt."""

_Recorded = dict[_Where, Tensor]
"""What passed at each site of each block in a forward pass."""


@dataclass(frozen=True, repr=False)
class Verification(Summary):
    """How far a way to run a kind of model agrees with plain transformers modules in eager attention.

    Attributes:
        way: which is taken.
        rule: which prompts may share a forward pass.
        errors: a row for each site and block: `site`, `layer` (-1 outside the blocks), `error` (of the worst token: the
            L2 norm of the difference over that of its vector; of attention, the largest difference of a probability),
            `limit`.
        unchecked: sites that have no counterpart in plain modules.
        why_not: why not everything could be checked; empty if it was.

    Example:
        >>> checked = melens.verify(model)
        >>> checked.agrees, checked.errors.columns.tolist()
        (True, ['site', 'layer', 'error', 'limit'])
    """

    way: Way
    rule: BatchRule
    errors: pd.DataFrame
    unchecked: tuple[str, ...] = ()
    why_not: str = ""

    @property
    def worst(self) -> dict[str, Any] | None:
        """The site and block with the largest error for its limit, None where nothing was checked."""
        return None if self.errors.empty else _worst_of(self.errors)

    @property
    def agrees(self) -> bool:
        """Whether every site that was checked is within its limit; a NaN is not."""
        return bool((self.errors["error"] <= self.errors["limit"]).all())

    def _heading(self) -> str:
        if (worst := self.worst) is None:
            return f"Verification: nothing was checked. {self.why_not}"
        found = "agrees" if self.agrees else "does not agree"
        where = worst["site"] if worst["layer"] < 0 else f"{worst['site']} of block {worst['layer']}"
        return (
            f"Verification: the {self.way} way {found} with transformers; largest error {worst['error']:.1e}, {where}"
        )

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The answer in short, ready for JSON."""
        by_site = self.errors.groupby("site", sort=False)["error"].max().to_dict()
        return {
            "checked": not self.why_not,
            "why_not": self.why_not or None,
            "way": self.way,
            "largest_error_by_site": by_site,
            "limit": None if self.errors.empty else float(self.errors["limit"].max()),
            "unchecked_sites": list(self.unchecked),
            "prompts_share_passes": asdict(self.rule) | {"limits": list(self.rule.limits)},
        }


def is_reduced(dtype: torch.dtype) -> bool:
    """Tell whether numbers are in reduced precision: bfloat16 or float16."""
    return dtype not in (torch.float32, torch.float64)


def limit_of(dtype: torch.dtype) -> float:
    """Return the relative error up to which two ways to run a model agree."""
    return 3e-2 if is_reduced(dtype) else 1e-3


@checked
def verify(model: Bridge, sites: SiteList | None = None) -> Verification:
    """Check the ways that a trace may take on a kind of model, anew, and return the errors of the one that is taken.

    Args:
        model: a bridge; what was hooked onto it, patched or folded is left out of the check.
        sites: as a probe names them; by default the usual ones that plain modules have.

    Raises:
        MelensError: a site that the model does not have, or no way agrees with transformers, in a sentence that names
            block and site.

    Example:
        >>> checked = melens.verify(model, ["hook_resid_post", "ln2.hook_out"])
        >>> sorted(checked.errors["site"].unique())
        ['hook_resid_post', 'ln2.hook_out']
    """
    for site in sites or ():
        if not Sites.of(model).find(site):
            raise MelensError(f"No block of this model has the site {site!r}; names are like 'hook_resid_post'.")
    if sites is None:
        paid = [site for site in _PAID if Sites.of(model).find(site)]
        sites = [*{site for site, _ in _places_of(model, _USUAL)}, *paid]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return _verify(model, sorted(set(sites)))


_USUAL = (
    "hook_resid_pre", "ln1.hook_in", "ln1.hook_out", "attn.hook_q", "attn.hook_k", "attn.hook_v",
    "hook_attn_out", "hook_resid_mid", "ln2.hook_out", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out",
    "hook_resid_post",
)  # fmt: skip

_KNOWN: WeakKeyDictionary[TransformerBridge, dict[tuple[str, ...], Verification]] = WeakKeyDictionary()


def verified(model: TransformerBridge, sites: Sequence[str]) -> Verification:
    """Return what `verify` says of a kind of model: from this process, from the user's cache, or by checking it now.

    What is known of more sites, where nothing was amiss, is an answer too: a check builds a bridge anew.
    """
    asked = tuple(sorted(set(sites)))
    known = _KNOWN.setdefault(model, {})
    if asked not in known:
        wider = next((found for sites, found in known.items() if _answers(model, asked, sites, found)), None)
        if wider is not None:
            return wider
        store = store_for_kind("verified", model.original_model, asked)
        known[asked] = _read(store) or verify(model, asked)
        if not known[asked].why_not:  # else it is true of this model, not of its kind
            content = asdict(known[asked]) | {"errors": known[asked].errors.to_dict("records")}
            store.save_text("verification", json.dumps(content))
    return known[asked]


def _answers(model: TransformerBridge, asked: Sequence[str], known: Sequence[str], found: Verification) -> bool:
    """Tell whether an answer for some sites holds for others: for a site in one block, if it is of all blocks."""
    names = {site: {at.site for at in Sites.of(model).find(site)} for site in asked}
    are_known = all(site in known or (names[site] and names[site] <= set(known)) for site in asked)
    return are_known and found.way == "fast" and not found.rule.alone


def _read(store: Store) -> Verification | None:
    if (kept := store.load_text("verification")) is None:
        return None
    content = json.loads(kept)
    rule = BatchRule(**content["rule"] | {"limits": tuple(content["rule"]["limits"])})
    errors = pd.DataFrame(content["errors"], columns=list(_COLUMNS))
    return Verification(content["way"], rule, errors, tuple(content["unchecked"]), content["why_not"])


_COLUMNS = ("site", "layer", "error", "limit")


# --- A trace ----------------------------------------------------------------------------------------------------------


def _verify(model: TransformerBridge, sites: Sequence[str]) -> Verification:
    network = model.original_model
    twin = twin_of(network, "eager")
    if twin is None:
        why_not = "The weights are sharded or not the model's own, so no plain model can be made of them."
        rule = replace(rule_of(network), equal_beyond=0)
        return Verification("fast", rule, _table({}), tuple(sites), why_not)
    rule = measured(twin.eval(), rule_of(twin))
    prompts = two_prompts(twin)
    places = _places_of(model, sites)
    # of a hybrid, transformers returns the patterns of the blocks with attention alone
    attending = [at.layer for at in Sites.of(model).find(ATTENTION_ON_KEYS)]
    expected = _Expected(network, twin, prompts, places, attending)
    fresh = bridge_around(twin, "verification")  # without what is hooked onto the model, or patched
    shares, complaints = rule.may_share([len(prompt) for prompt in prompts]), list[str]()
    rules = [rule, replace(rule, alone=True)] if shares else [rule]
    ways: list[tuple[Way, BatchRule]] = [(way, its_rule) for way in ("fast", "bridge") for its_rule in rules]
    if misplaced := _misplaced(fresh, expected, prompts, places):
        ways = [(way, its_rule) for way, its_rule in ways if way == "bridge"]
        where = ", ".join(misplaced)
        complaints.append(
            f"On {type(network).__name__} the hook points of {where} have another tensor than the module."
        )
    for way, its_rule in ways:
        try:
            errors = expected.errors_of(_measure(fresh, prompts, sites, its_rule, way=way))
        except MelensError as error:
            complaints.append(str(error))
            continue
        unchecked = [site for site in sites if not any(at[:2] in errors for at in Sites.of(model).find(site))]
        why_not = "" if expected.is_finite else "The model's own numbers are not all finite."
        found = Verification(way, its_rule, _table(errors), tuple(unchecked), why_not)
        if found.agrees:
            if complaints:
                warnings.warn(f"{complaints[0]} {_INSTEAD[way]}", stacklevel=4)
            return found
        complaints.append(_complaint(network, found))
    raise MelensError(f"{complaints[0]} No slower way agrees either, so nothing is measured on this model.")


_INSTEAD = {
    "fast": "Prompts are therefore run one by one.",
    "bridge": "It is therefore run through TransformerLens's own components, which takes more time and memory.",
}


def _complaint(network: nn.Module, found: Verification) -> str:
    """Name the first block that is off, and the site there that is most: what follows only inherits it."""
    off = found.errors[~(found.errors["error"] <= found.errors["limit"])]
    worst = _worst_of(off[off["layer"] == off["layer"].min()])
    where = f"block {worst['layer']}" if worst["layer"] >= 0 else "outside the blocks"
    return (
        f"On {type(network).__name__} the fast way is off by {worst['error']:.2g} at {worst['site']}, {where}, against "
        f"transformers' own eager forward pass (limit {worst['limit']:g})."
    )


def _worst_of(errors: pd.DataFrame) -> dict[str, Any]:
    excess = (errors["error"] / errors["limit"]).fillna(np.inf)
    return {str(name): value for name, value in errors.iloc[int(excess.to_numpy().argmax())].items()}


def _table(errors: Mapping[_Where, tuple[float, float]]) -> pd.DataFrame:
    return pd.DataFrame([(*where, *measured) for where, measured in errors.items()], columns=list(_COLUMNS))


def two_prompts(network: Any, *, room: int = 0) -> list[_Tokens]:
    """Draw two prompts of unequal length, the longer one beyond a window or chunk, as far as that is near.

    Args:
        network: a transformers model.
        room: tokens of its context to leave.
    """
    config = network.config.get_text_config()
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    near = [span for span in spans if isinstance(span, int) and span <= _FAR]
    most = (getattr(config, "max_position_embeddings", None) or _FAR + _LONG) - room
    long = min(max([_LONG, *(span + _SHORT for span in near)]), most)
    vocabulary = network.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary // 2, (2, long), generator=generator)  # images' ids are among the last
    return [tokens[0], tokens[1, : min(_SHORT, long - 1)]]


# --- What plain modules give ------------------------------------------------------------------------------------------


def _places_of(model: TransformerBridge, sites: Sequence[str]) -> dict[_Where, Place]:
    """Find in the plain twin where the tensor of each site passes; of sites inside a component there is none."""
    places = Twin(model).places
    found = [at for site in sites for at in Sites.of(model).find(site) if id(at.hook_point) in places]
    return {(site, layer): places[id(hook_point)] for site, layer, hook_point in found}


def _misplaced(
    fresh: TransformerBridge, expected: _Expected, prompts: Sequence[_Tokens], places: Mapping[_Where, Place]
) -> list[str]:
    """List the sites whose hook points give another tensor than passes at their place, which `expected` forgets."""
    unknown = {site for (site, _), place in places.items() if not place.is_known}
    if not unknown:
        return []
    try:
        found = _measure(fresh, prompts, sorted(unknown), BatchRule(alone=True), way="bridge")
    except Exception:  # TransformerLens cannot run what transformers can: nothing to compare with
        return []
    misplaced = sorted({site for (site, _), (error, _) in expected.errors_of(found).items() if not error < _ANOTHER})
    expected.forget(misplaced)
    return misplaced


class _Expected:
    """What transformers computes by itself, each prompt alone, and how far something else is from it.

    In reduced precision a rounded bit in the embeddings makes some models differ from themselves by more than any
    limit, where attention is sharp: a site may be off by `_ROUNDINGS` times that. And in a mixture of experts it sends
    single tokens to another expert, whatever is run: there `_REROUTED` of the tokens are left out.
    """

    def __init__(
        self, network: Any, twin: Any, prompts: Sequence[_Tokens], places: Mapping[_Where, Place], attending: list[int]
    ) -> None:
        self._network, self._prompts, self._places, self._attending = network, prompts, places, attending
        dtype = next(twin.parameters()).dtype
        self._is_reduced, self._limit = is_reduced(dtype), limit_of(dtype)
        has_experts = any("expert" in name for name, _ in twin.named_modules())
        self._share = 1 - _REROUTED if self._is_reduced and has_experts else 1.0
        self._eager = [self._run(twin, prompt) for prompt in prompts]

    @cached_property
    def _rounded(self) -> list[_Recorded]:
        """What the model gives when every entry of its embeddings is off by about one rounding."""
        twin = twin_of(self._network, "eager").eval()
        generator = torch.Generator().manual_seed(0)

        def perturb(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
            noise = torch.randn(embedded.shape, generator=generator).to(embedded)
            return embedded * (1 + torch.finfo(embedded.dtype).eps * noise)

        twin.get_input_embeddings().register_forward_hook(perturb)
        return [self._run(twin, prompt) for prompt in self._prompts]

    def _run(self, network: Any, prompt: _Tokens) -> _Recorded:
        recorded: dict[_Where, list[Tensor]] = {where: [] for where in self._places}
        handles = [place.attach(partial(_keep, recorded[where]), network) for where, place in self._places.items()]
        forget_longest(network)
        try:
            ids = prompt[None].to(input_device(network))
            output = base_of(network)(input_ids=ids, use_cache=False, output_attentions=True)
        finally:
            for handle in handles:
                handle.remove()
        whole = {where: values[0] for where, values in recorded.items() if len(values) == 1}
        patterns = getattr(output, "attentions", None) or ()
        blocks: Any = () if kind_of(network.config) is None else view_model(network).blocks
        layers = self._attending if len(patterns) == len(self._attending) else range(len(patterns))
        for layer, pattern in zip(layers, patterns, strict=True):
            if isinstance(pattern, Tensor) and pattern.ndim == 4:
                whole["attn.hook_pattern", layer] = pattern
                attended = pattern_of(blocks[layer].attention, pattern) if blocks else FromPattern(pattern)
                for site in _PAID:
                    whole[site, layer] = _paid(site, attended, [len(prompt)])
        return whole

    @property
    def is_finite(self) -> bool:
        """Whether the model's own numbers are, all of them."""
        return all(bool(values.isfinite().all()) for recorded in self._eager for values in recorded.values())

    def forget(self, sites: Sequence[str]) -> None:
        """Expect nothing at some sites."""
        self._eager = [{at: values for at, values in own.items() if at[0] not in sites} for own in self._eager]

    def errors_of(self, found: Sequence[_Recorded]) -> dict[_Where, tuple[float, float]]:
        """Return the error at each site that both have, and its limit, of the prompt where it is worse."""
        errors: dict[_Where, tuple[float, float]] = {}
        for row, own in enumerate(found):
            eager = self._eager[row]
            for where in sorted(own.keys() & eager.keys(), key=lambda where: (where[1], where[0])):
                if not eager[where].isfinite().all() and not own[where].isfinite().all():
                    continue  # the model's own doing, whichever way it runs
                error, limit = _error(where[0], own[where], eager[where], self._share), self._limit
                if self._is_reduced and not error <= limit:
                    rounding = _error(where[0], self._rounded[row][where], eager[where], self._share)
                    limit = max(limit, _ROUNDINGS * rounding)
                before = errors.get(where, (0.0, 1.0))
                if not error / limit <= before[0] / before[1]:  # a NaN is worse than anything
                    errors[where] = (error, limit)
                errors.setdefault(where, (error, limit))
        return errors


def _keep(values: list[Tensor], activation: Tensor) -> None:
    values.append(activation.clone())


_PAID = (ATTENTION_ON_KEYS, ATTENTION_BY_KEY)

_ATTENTIONS = (*_PAID, "attn.hook_pattern")
"""Sites whose tensors hold probabilities, `[batch, head, query, key]`, or `[batch, head, key, 1]`."""


def _error(site: str, found: Tensor, expected: Tensor, share: float | int = 1.0) -> float:
    """Return the largest error of a prompt's token: of its vector the relative one, of attention a probability's.

    By token, because one massive token would hide any error of the others. Only the `share` of the tokens with the
    smallest errors counts.
    """
    if found.numel() != expected.numel():
        return float("inf")
    own, plain = found.float(), expected.to(found.device).reshape(found.shape).float()  # some flatten their tokens
    if site in _ATTENTIONS:
        errors = (own - plain).abs().amax((1, 3))
    else:
        own, plain = own.flatten(2), plain.flatten(2)
        sizes = plain.norm(dim=-1)
        floor = (1e-2 * sizes.median()).clamp(min=1e-12)  # of a token for which next to nothing is written
        errors = (own - plain).norm(dim=-1) / sizes.clamp(min=float(floor))
    if errors.isnan().any():
        return float("nan")
    return float(errors.flatten().sort().values[math.ceil(share * errors.numel()) - 1])


# --- What a trace gives -----------------------------------------------------------------------------------------------


def _measure(
    model: TransformerBridge, prompts: Sequence[_Tokens], sites: Sequence[str], rule: BatchRule, *, way: Way
) -> list[_Recorded]:
    """Run the prompts as a trace does, and return what passes once at each site, a prompt each."""
    lengths = [len(prompt) for prompt in prompts]
    wanted = [at for site in sites for at in Sites.of(model).find(site)]
    paid_sites = [site for site in _PAID if site in sites]
    found: list[_Recorded] = [{} for _ in prompts]
    for rows in [[0, 1]] if rule.may_share(lengths) else [[0], [1]]:
        tokens = torch.nn.utils.rnn.pad_sequence([prompts[row] for row in rows], batch_first=True)
        recorded: dict[_Where, list[Tensor]] = defaultdict(list)
        recorders = [(at.hook_point, partial(_keep, recorded[at[:2]])) for at in wanted if at.hook_point is not None]

        def record_attention(layer: int, attended: Attended, rows: Any = rows, recorded: Any = recorded) -> None:
            for site in paid_sites:
                _keep(recorded[site, layer], _paid(site, attended, [lengths[row] for row in rows]))

        with running(model, recorders, record_attention if paid_sites else None, way=way) as network:
            forget_longest(network)
            base_of(network)(input_ids=tokens.to(input_device(network)), use_cache=False)
        for at, row in enumerate(rows):
            for where, values in recorded.items():
                if len(values) == 1 and len(values[0]) == len(rows):
                    found[row][where] = _without_padding(where[0], values[0][at : at + 1], lengths[row])
    return found


def _paid(site: str, attended: Attended, lengths: Sequence[int]) -> Tensor:
    """Read what attention pays to token 0, or to every key by each query that sees it."""
    if site == ATTENTION_ON_KEYS:
        return attended.on_keys([0])
    paid, seen_by = attended.by_key(torch.tensor(lengths, dtype=torch.int32)).unbind(-1)
    return (paid / seen_by.clamp(min=1))[..., None]


def _without_padding(site: str, activation: Tensor, length: int) -> Tensor:
    if site in _PAID:
        return activation[:, :, :length]
    return activation[:, :, :length, :length] if site in _ATTENTIONS else activation[:, :length]
