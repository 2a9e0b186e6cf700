"""WeMask (section 4) and the masks it is compared with: which dims of which tokens are masked where.

`h̃ = h ⊙ (1 - strength · m)` with `m_d = 1` for the chosen dims, in the blocks behind the ME layer: `WeMask(rate)` is
equations 4 and 5. What the paper leaves open is an argument here; what the authors' code does otherwise has a name of
its own.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import PlainValidator
from torch import Tensor

from melens.analysis.me_layer import Emergence
from melens.errors import MelensError
from melens.masks.hooks import InstalledMask, TokenFinder
from melens.models.kv_cache import find_cache_by_any_name
from melens.models.view import ModelView, view_model
from melens.validation.signatures import Folder, as_integer, checked, given, must_be
from melens.validation.types import Flag, Layers, Positions, Rate, Select, Share, Site, Start, Whole, check_fields

__all__ = ["FixedDims", "WeMask"]

FROM_WEIGHTS = ("weight", "weight_low")
FROM_VALUES = ("magnitude", "batch_magnitude")
_FILE = "wemask.json"
_SAME_GAINS = 0.01
"""Relative distance of the weights of ln1 in a block up to which a model is the one saved: bfloat16 rounds by 0.002."""


@dataclass(frozen=True)
class FixedDims:
    """The dims of a mask on a certain model.

    Attributes:
        dims: by block; None where they depend on the token.
        blocks: which are masked.
        model: what tells the model: `architecture`, `n_layers`, `d_model`, `vocabulary`, and `gain_sketches` of
            `ln1` by block (see `melens.models.view.ModelView`).
    """

    dims: dict[int, tuple[int, ...]] | None
    blocks: tuple[int, ...]
    model: dict[str, Any]


def _me_layer(me: Any) -> Emergence | int | None:
    """Take what `find_me_layer` found, or a block of any kind of integer."""
    layer = as_integer(me)
    if not (me is None or isinstance(me, Emergence) or (isinstance(layer, int) and layer is not True and layer >= 0)):
        raise must_be("what melens.find_me_layer(trace) found, or a block, counted from 0")
    return layer


@dataclass(frozen=True)
class WeMask:
    """A mask on some dims of a few tokens, in some blocks.

    Attributes:
        rate: share of the width that is masked, from 0 (nothing) to 1: k = floor(rate · d) dims. A rate over 0 that
            selects no dim is refused where the width is known (the authors' code masks nothing then, without a word).
        select: how they are chosen, as `melens.validation.types.Select` tells.
        site: where the mask takes hold, as `melens.validation.types.Site` tells.
        start: the first masked block (0-based), or `"me"`, `"me+1"`, `"me-2"`: counted from the ME layer, once
            `at(me)` has told which it is. `me+1` is the first block whose attention sees the massive activation.
        layers: `"all"` (every block from `start` on), `"first"` (only `start`), or the blocks themselves.
        positions: `"first"` (token 0), `"massive"` (tokens that are massive where they enter the first masked block, at
            prefill), `"all"`, absolute positions, or `"every_call"` (index 0 of each forward call, generated tokens and
            padding included, as in the authors' code).
        strength: 1 sets the dims to zero, less scales them by `1 - strength`.
        seed: of the random dims; each block draws its own, and those of a lower rate are among those of a higher.
        massive_dims: for `select="massive"`; `at(me)` fills them in.
        fixed: the dims on a certain model, once they are settled (`on`, `load`).

    Raises:
        MelensError: a value that is not allowed.
    """

    rate: Rate = 0.1
    select: Select = "weight"
    site: Site = "attn_in"
    start: Start = "me+1"
    layers: Layers = "all"
    positions: Positions = "first"
    strength: Share = 1.0
    seed: Whole = 0
    massive_dims: tuple[int, ...] = ()
    fixed: FixedDims | None = field(default=None, repr=False)
    _last: dict[str, FixedDims] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, "The mask's {}")
        object.__setattr__(self, "layers", _as_tuple(self.layers))
        object.__setattr__(self, "positions", _as_tuple(self.positions))

    # --- Which blocks and dims ----------------------------------------------------------------------------------------

    @checked
    def at(self, me: Annotated[Emergence | int | None, PlainValidator(_me_layer)]) -> WeMask:
        """Return the mask with its start counted from an ME layer.

        Args:
            me: what `find_me_layer` found (its dims become those of `select="massive"`), or the ME layer
                itself: a block of any kind of integer, None without one.

        Raises:
            MelensError: the model has no ME layer.
        """
        layer = me.layer if isinstance(me, Emergence) else me
        if layer is None and (isinstance(self.start, str) or self.select == "massive"):
            raise MelensError("This model has no ME layer to start from: give wemask.start as a block.")
        start, dims = self.start, self.massive_dims
        if isinstance(start, str):
            assert layer is not None
            start = layer + int(start.removeprefix("me") or 0)
            if start < 0:
                raise MelensError(f"The mask would start {-start} before the first block: the ME layer is {layer}.")
        if self.select == "massive" and not dims and isinstance(me, Emergence):
            dims = me.dims
        return replace(self, start=start, massive_dims=dims)

    def blocks(self, model: Any) -> tuple[int, ...]:
        """Return the blocks that are masked; those of a hybrid model without attention only where `site` allows.

        Raises:
            MelensError: blocks that the model does not have, or cannot be masked at this site.
        """
        return self._blocks(view_model(model))

    def dims(self, model: Any) -> dict[int, Int[Tensor, " k"]]:
        """Return the masked dims by block, in order.

        Raises:
            MelensError: as `blocks`; a rate that leaves no dim; dims that are only known once there is a token.
        """
        if self.select in FROM_VALUES:
            raise MelensError(f"The dims of select={self.select} are chosen token by token, in each forward call.")
        fixed = self.on(model).fixed
        assert fixed is not None
        assert fixed.dims is not None
        return {layer: torch.tensor(dims) for layer, dims in fixed.dims.items()}

    def on(self, model: Any) -> WeMask:
        """Return the mask with its dims settled for a model, as they then stay whatever becomes of the weights.

        Raises:
            MelensError: as `blocks` and `dims`; for a mask that was settled before, another model.
        """
        return self._on(view_model(model))

    def moved_to(self, model: Any) -> WeMask:
        """Return a settled mask with the same dims for a model whose weights have changed since, as in training.

        Raises:
            MelensError: the mask was never settled on a model.
        """
        if self.fixed is None:
            raise MelensError("This mask has no dims to move yet: call mask.on(model) first.")
        return replace(self, fixed=replace(self.fixed, model=_identity(view_model(model))))

    def told(self) -> dict[str, Any]:
        """Return the arguments, ready for JSON."""
        arguments = {name: value for name, value in asdict(replace(self, fixed=None)).items() if name[0] != "_"}
        del arguments["fixed"]
        return arguments

    def _on(self, network: ModelView) -> WeMask:
        if self.fixed is not None:
            _check_same(self.fixed.model, _identity(network))
            return self
        blocks = self._blocks(network)
        dims = None
        if self.select in FROM_VALUES:
            self._count(network.d_model)
        else:
            gains = {layer: network.gain(layer) for layer in blocks} if self.select in FROM_WEIGHTS else {}
            dims = {layer: tuple(self._choose_dims(network, layer, gains.get(layer)).tolist()) for layer in blocks}
            _warn_of_alike(gains)
        self._last["fixed"] = FixedDims(dims, blocks, _identity(network))
        return replace(self, fixed=self._last["fixed"])

    def _blocks(self, network: ModelView) -> tuple[int, ...]:
        n_layers = len(network.blocks)
        if isinstance(self.layers, tuple):
            blocks = self.layers
        elif isinstance(self.start, str):
            raise MelensError(
                f"The mask starts at {self.start!r}: tell it the ME layer, mask.at(melens.find_me_layer(trace)), or "
                "give start as a block."
            )
        else:
            blocks = tuple(range(self.start, n_layers) if self.layers == "all" else range(self.start, self.start + 1))
        if not blocks or max(blocks) >= n_layers:
            start = self.start if not blocks else max(blocks)
            raise MelensError(f"The mask has no block {start} to take hold in: the model's are 0 to {n_layers - 1}.")
        if self.site == "resid_pre":
            return blocks
        able = tuple(layer for layer in blocks if network.can_mask_attention(layer))
        if not able or (isinstance(self.layers, tuple) and able != blocks):
            is_without = {layer: network.blocks[layer].attention is None for layer in blocks if layer not in able}
            unable = min(is_without, key=lambda layer: (is_without[layer], layer))
            why = "no attention" if is_without[unable] else "attention without a norm ln1 of its own before it"
            raise MelensError(f"Block {unable} has {why}, so site={self.site} has no place there; resid_pre has.")
        return able

    def _count(self, d_model: int) -> int:
        count = math.floor(self.rate * d_model + 1e-9)  # 0.29 · 100 is 28.999…
        if count < 1 and self.rate > 0:
            digits = 1 - math.floor(math.log10(1 / d_model))
            least = math.ceil(10**digits / d_model) / 10**digits  # two digits, rounded up: it selects one dim
            raise MelensError(
                f"Rate {self.rate:g} selects 0 of {d_model} dims; use at least {least:g}, or 0 for no mask."
            )
        return count

    def _choose_dims(self, network: ModelView, layer: int, gain: Tensor | None) -> Int[Tensor, " k"]:
        if self.rate == 0:
            return torch.empty(0, dtype=torch.long)
        if self.select == "massive":
            dims = self.massive_dims if isinstance(self.massive_dims, Sequence) else ()
            if not dims or not all(isinstance(dim, int) and 0 <= dim < network.d_model for dim in dims):
                raise MelensError(
                    f"select=massive has the dims {given(self.massive_dims)}: mask.at(melens.find_me_layer(trace)) "
                    f"gives those of this model, whose width is {network.d_model}."
                )
            return torch.tensor(sorted(dims))
        count = self._count(network.d_model)
        if self.select == "random":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
            return torch.randperm(network.d_model, generator=generator)[:count].sort().values
        assert gain is not None
        return _by_gain(gain, count, largest=self.select == "weight")

    # --- On a model ---------------------------------------------------------------------------------------------------

    @checked
    def install(self, model: Any, *, refresh: Flag = False) -> InstalledMask:
        """Mask a model until `remove()` is called on what is returned.

        Args:
            model: a `TransformerBridge`, or a transformers model of an architecture that TransformerLens knows, also
                within PEFT, DistributedDataParallel, DataParallel or torch.compile.
            refresh: in training, choose the dims anew in each forward call, from the gains as they are by then.

        Raises:
            MelensError: before anything is attached: as `blocks` and `dims`, or a model that cannot be masked.
        """
        network = view_model(model)
        settled = self._on(network).fixed
        assert settled is not None
        if refresh and self.select not in FROM_WEIGHTS:
            raise MelensError(f"refresh chooses by the gains anew, which select={self.select} does not look at.")
        if network.bridge is not None and self.site != "resid_pre":
            shared = [layer for layer in settled.blocks if network.blocks[layer].ln1_is_shared]
            if shared:
                raise MelensError(
                    f"In block {shared[0]} of this bridge more than attention reads ln1, so that a mask would not "
                    "be on attention alone; mask the plain transformers model, or take site=resid_pre."
                )
        factors = _Factors(self, network, settled, refresh=refresh)
        if network.bridge is not None:
            find_cache_by_any_name(network.bridge)
        caches = bool(getattr(network.base.config, "use_cache", False))
        finder = TokenFinder(self.positions, caches_by_default=caches)
        return InstalledMask(network, settled.blocks, self.site, finder, factors)

    @contextmanager
    def applied(self, model: Any, *, refresh: bool = False) -> Iterator[InstalledMask]:
        """Mask a model for as long as the context lasts; arguments and errors as for `install`."""
        installed = self.install(model, refresh=refresh)
        try:
            yield installed
        finally:
            installed.remove()

    # --- Beside a checkpoint ------------------------------------------------------------------------------------------

    @checked
    def save(self, folder: Folder) -> Path:
        """Write `wemask.json` into a folder, with the dims as they were settled on the model last masked.

        Raises:
            MelensError: the mask was never on a model, or the folder cannot be written to.
        """
        from melens.report.result import write_text

        fixed = self.fixed or self._last.get("fixed")
        if fixed is None:
            raise MelensError("This mask was on no model yet, so that it has no dims to save: mask.on(model) has.")
        content = {"melens": metadata.version("melens"), "wemask": self.told(), **asdict(fixed)}
        folder = Path(folder)
        if not folder.is_dir():
            raise MelensError(f"There is no folder {folder} to save the mask in.")
        return write_text(folder / _FILE, json.dumps(content, indent=2) + "\n")

    @classmethod
    @checked
    def load(cls, folder: Folder) -> WeMask:
        """Read what `save` wrote: a mask with its dims settled, for that model alone.

        Raises:
            MelensError: no such file, or one that this version's `save` did not write.
        """
        path = Path(folder) / _FILE
        try:
            content = json.loads(path.read_text("utf-8"))
            dims = content["dims"]
            by_block = None if dims is None else {int(layer): tuple(chosen) for layer, chosen in dims.items()}
            fixed = FixedDims(by_block, tuple(content["blocks"]), dict(content["model"]))
            arguments = content["wemask"] | {"massive_dims": tuple(content["wemask"]["massive_dims"])}
            mask = cls(**arguments, fixed=fixed)
        except OSError as error:
            raise MelensError(f"There is no mask {path}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MelensError(f"{path} is no mask that melens saved.") from error
        if "gain_sketches" not in fixed.model:
            raise MelensError(
                f"{path} is of an earlier melens, which took a model with shuffled weights for the same: put the mask "
                "on its model and save it anew."
            )
        return mask


class _Factors:
    """By what the dims of the chosen tokens are multiplied: `choose` of an `InstalledMask`.

    Factors that do not depend on the token are non-persistent buffers of their block: they move with the model, and no
    checkpoint holds them.
    """

    def __init__(self, mask: WeMask, network: ModelView, settled: FixedDims, *, refresh: bool) -> None:
        self._left = 1 - mask.strength
        self._select, self._refresh = mask.select, refresh
        self._count = 0 if mask.select == "massive" else mask._count(network.d_model)
        self._modules = {layer: network.blocks[layer].module for layer in settled.blocks}
        self._buffer = f"melens_mask_{id(self)}"
        if refresh:
            self._gains = {layer: network.gain_parameter(layer) for layer in settled.blocks}
        for layer, dims in (settled.dims or {}).items():
            like = next(self._modules[layer].parameters())
            device = torch.device("cpu") if like.is_meta else like.device
            factors = torch.ones(network.d_model, dtype=like.dtype)
            masked = np.array(dims, dtype=np.int64)  # a list of Python's takes five times as long
            factors[torch.from_numpy(masked)] = self._left
            self._modules[layer].register_buffer(self._buffer, factors.to(device), persistent=False)

    def __call__(self, layer: int, rows: Float[Tensor, "*n d"]) -> Tensor:
        if self._select in FROM_VALUES:
            size = rows.detach().abs()
            if self._select == "batch_magnitude":
                size = size.flatten(0, -2).mean(0)
            dims = size.topk(self._count, dim=-1).indices
            return torch.ones_like(size).scatter(-1, dims, self._left)
        module = self._modules[layer]
        if self._refresh and module.training:
            weight, offset = self._gains[layer]
            dims = _by_gain(weight.detach().float() + offset, self._count, largest=self._select == "weight")
            buffer = module.get_buffer(self._buffer)
            buffer.fill_(1).index_fill_(0, dims.to(buffer.device), self._left)
        return module.get_buffer(self._buffer).to(rows)

    def remove(self) -> None:
        for module in self._modules.values():
            module._buffers.pop(self._buffer, None)
            module._non_persistent_buffers_set.discard(self._buffer)


def _warn_of_alike(gains: Mapping[int, Tensor]) -> None:
    """Tell in one sentence of the blocks whose gains, being all alike or no numbers, choose nothing."""
    alike = [
        layer
        for layer, gain in gains.items()
        if not gain.isfinite().all() or gain.abs().max() - gain.abs().min() <= 1e-6 * gain.abs().max()
    ]
    if not alike:
        return
    is_span = len(alike) > 2 and alike == list(range(alike[0], alike[-1] + 1))
    where = f"{alike[0]} to {alike[-1]}" if is_span else ", ".join(map(str, alike))
    blocks = f"block {where}" if len(alike) == 1 else f"blocks {where}"
    warnings.warn(f"The gains of ln1 in {blocks} are all alike: they choose no dims there.", stacklevel=4)


def _by_gain(gain: Float[Tensor, " d"], count: int, *, largest: bool) -> Int[Tensor, " k"]:
    """Choose the dims with the largest |gain|, or the smallest; of equal ones the first, on every device."""
    return gain.abs().sort(descending=largest, stable=True).indices[:count].sort().values


# --- Which model ------------------------------------------------------------------------------------------------------


def _identity(network: ModelView) -> dict[str, Any]:
    return {
        "architecture": network.architecture,
        "n_layers": len(network.blocks),
        "d_model": network.d_model,
        "vocabulary": network.vocabulary,
        "gain_sketches": network.gain_sketches(),
    }


def _check_same(saved: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raise a `MelensError` if a mask was settled on another model; precision may differ."""
    for name in ("architecture", "n_layers", "d_model", "vocabulary"):
        if saved.get(name) != model[name]:
            raise MelensError(
                f"This mask is of another model: its {name} is {saved.get(name)!r}, this model's is {model[name]!r}."
            )
    for layer, (of_saved, of_model) in enumerate(zip(saved["gain_sketches"], model["gain_sketches"], strict=True)):
        if of_saved is not None and not _are_same_gains(of_saved, of_model):
            raise MelensError(f"This mask is of another model: the weights of ln1 in block {layer} differ.")


def _are_same_gains(saved: Sequence[float], model: Sequence[float] | None) -> bool:
    if model is None:
        return False
    least = 0.1  # of the size that the tolerance is relative to: weights that a model begins with may be 0
    return math.dist(saved, model) <= _SAME_GAINS * max(math.hypot(*saved), least)


def _as_tuple(value: Any) -> Any:
    return value if isinstance(value, str) else tuple(sorted(set(value)))
