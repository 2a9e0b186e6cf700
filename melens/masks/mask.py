"""WeMask (section 4 of the paper) and the masks it is compared with: what is masked, of which tokens, where.

`h̃ = h ⊙ (1 - strength · m)` with `m_d = 1` for the chosen dims, in the blocks behind the ME layer: `WeMask(rate)` is
equations 4 and 5. What the paper leaves open is an argument here; what the authors' code does otherwise has a name of
its own.

    mask.at(me)      counts `start` from the ME layer
    mask.on(model)   chooses the dims of each block (`dims.py`); they then stay the same whatever becomes of the weights
    mask.install     puts the hooks on a model (`hooks.py`); `applied` takes them off again; `save` and `load` keep it
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Int
from pydantic import PlainValidator
from torch import Tensor

from melens.analysis.me_layer import Emergence
from melens.errors import MelensError
from melens.masks.dims import (
    BY_GAIN,
    DimFactors,
    FixedDims,
    check_same_model,
    choose_dims,
    count_dims,
    identify,
    redraw_tied_dims,
)  # fmt: skip
from melens.masks.files import MASK_FILE, no_mask, read_mask
from melens.masks.hooks import InstalledMask
from melens.masks.tokens import TokenFinder
from melens.models.kv_cache import find_cache_by_any_name
from melens.models.layout import listed
from melens.models.view import ModelView, view_model
from melens.printing import Summary
from melens.storage.files import write_text
from melens.validation.signatures import Folder, as_integer, checked, must_be
from melens.validation.types import Flag, Layers, Positions, Rate, Said, Select, Share, Site, Start, Whole, check_fields

__all__ = ["FixedDims", "WeMask"]


def _me_layer(me: Any) -> Emergence | int | None:
    """Take what `find_me_layer` found, or a block of any kind of integer."""
    layer = as_integer(me)
    if not (me is None or isinstance(me, Emergence) or (isinstance(layer, int) and layer is not True and layer >= 0)):
        raise must_be("what melens.find_me_layer(trace) found, or a block, counted from 0")
    return layer


@dataclass(frozen=True, repr=False)
class WeMask(Summary):
    """A mask on some dims of a few tokens, in some blocks (section 4, equations 4 and 5).

    Attributes:
        rate: share of the width that is masked, from 0 (nothing) to 1: k = floor(rate · d) dims. A rate over 0 that
            selects no dim is refused where the width is known (the authors' code masks nothing then, without a word).
        select: how they are chosen, as in `melens.validation.types.Select`. Of equal gains, which are common in
            bfloat16, the first dims are masked; `with_ties_drawn` gives another choice.
        site: where in a block the mask acts, as in `melens.validation.types.Site`.
        start: the first masked block (0-based), or `"me"`, `"me+1"`, `"me-2"`: counted from the ME layer, once
            `at(me)` says which that is. `me+1` is the first block whose attention sees the massive activation.
        layers: `"all"` (every block from `start` on), `"first"` (only `start`), or the blocks themselves.
        positions: `"first"` (token 0), `"massive"` (tokens that are massive where they enter the first masked block, at
            prefill), `"all"`, absolute positions, or `"every_call"` (index 0 of each forward call, generated tokens and
            padding included, as in the authors' code).
        strength: 1 sets the dims to zero, less scales them by `1 - strength`.
        seed: of the random dims; each block draws its own, and those of a lower rate are among those of a higher.
        massive_dims: for `select="massive"`; `at(me)` fills them in.
        fixed: the dims on a certain model, once they are chosen (`on`, `load`).

    Raises:
        MelensError: a value that is not allowed.

    Example:
        >>> mask = melens.WeMask(rate=0.1, start="me+1").at(study.me)
        >>> mask.start, len(mask.dims(model)[3]) == int(0.1 * model.cfg.d_model)
        (3, True)
        >>> with mask.applied(model):
        ...     masked = melens.trace(model, prompts)
        >>> before, after = trace["norm"].query("layer == 2"), masked["norm"].query("layer == 2")
        >>> bool((before["norm"] == after["norm"]).all())  # nothing changes up to the first masked block
        True
    """

    rate: Rate = 0.1
    select: Select = "weight"
    site: Site = "attn_in"
    start: Start = "me+1"
    layers: Layers = "all"
    positions: Positions = "first"
    strength: Share = 1.0
    seed: Whole = 0
    massive_dims: Annotated[Sequence[Whole], Said("dims, counted from 0")] = ()
    fixed: FixedDims | None = None
    _last: dict[str, FixedDims] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, "The mask's {}")
        for name in ("layers", "positions"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, str) else tuple(sorted(set(value))))
        object.__setattr__(self, "massive_dims", tuple(self.massive_dims))

    def _heading(self) -> str:
        always = ("rate", "select", "site", "start")
        shown = [name for name in self.to_dict() if name in always or getattr(self, name) != getattr(WeMask, name)]
        words = f"WeMask({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"
        if self.fixed is None:
            return words
        of_model = f"{listed(self.fixed.blocks)} of {self.fixed.model['architecture']}"
        counts = {len(dims) for dims in (self.fixed.dims or {}).values()}
        dims = f"{max(counts)} of {self.fixed.model['d_model']} dims" if counts else "dims by token"
        return f"{words}, {dims} in {of_model}"

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
            raise MelensError("This model has no ME layer to start from: give start (wemask.start) as a block.")
        start, dims = self.start, self.massive_dims
        if isinstance(start, str):
            assert layer is not None
            start = layer + int(start.removeprefix("me") or 0)
            if start < 0:
                raise MelensError(f"start={self.start} is before the first block: the ME layer is block {layer}.")
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
            MelensError: as `blocks`; a rate that selects no dim; dims that depend on the token.
        """
        fixed = self.on(model).fixed
        assert fixed is not None
        if fixed.dims is None:
            raise MelensError(f"select={self.select} chooses its dims token by token, in each forward pass.")
        return {layer: torch.tensor(dims) for layer, dims in fixed.dims.items()}

    def on(self, model: Any) -> WeMask:
        """Return the mask with its dims chosen for a model, as they then stay whatever becomes of the weights.

        Raises:
            MelensError: as `blocks` and `dims`; another model than the dims were chosen for before.
        """
        return self._on(view_model(model))

    def moved_to(self, model: Any) -> WeMask:
        """Return a mask that has its dims with the same ones for a model whose weights have changed, as in training.

        Raises:
            MelensError: the mask's dims were never chosen.
        """
        if self.fixed is None:
            raise MelensError("This mask has no dims to move yet: call mask.on(model) first.")
        return replace(self, fixed=replace(self.fixed, model=identify(view_model(model))))

    def with_ties_drawn(self, model: Any, seed: int) -> WeMask | None:
        """Return the mask with other dims where gains are equal, drawn at random; None where none are.

        Raises:
            MelensError: as `on`; a mask whose dims are not chosen by gain.
        """
        if self.select not in BY_GAIN:
            raise MelensError(f"select={self.select} does not choose by gain: only weight and weight_low have ties.")
        view = view_model(model)
        chosen = self._on(view).fixed
        assert chosen is not None
        drawn = redraw_tied_dims(view, chosen, seed)
        return None if drawn is None else replace(self, fixed=drawn)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name not in ("fixed", "_last")}

    def _on(self, view: ModelView) -> WeMask:
        if self.fixed is not None:
            check_same_model(self.fixed.model, identify(view))
            return self
        blocks = self._blocks(view)
        dims = choose_dims(
            view, blocks, rate=self.rate, select=self.select, seed=self.seed, massive_dims=self.massive_dims
        )
        self._last["fixed"] = FixedDims(dims, blocks, identify(view))
        return replace(self, fixed=self._last["fixed"])

    def _blocks(self, view: ModelView) -> tuple[int, ...]:
        n_layers = len(view.blocks)
        if isinstance(self.layers, tuple):
            blocks = self.layers
        elif isinstance(self.start, str):
            raise MelensError(
                f"The mask's start is {self.start!r}, counted from the ME layer: call "
                "mask.at(melens.find_me_layer(trace)) first, or give start as a block."
            )
        else:
            blocks = tuple(range(self.start, n_layers) if self.layers == "all" else range(self.start, self.start + 1))
        if not blocks or max(blocks) >= n_layers:
            start = self.start if not blocks else max(blocks)
            raise MelensError(f"The model has no block {start} to mask: its blocks are 0 to {n_layers - 1}.")
        if self.site == "resid_pre":
            return blocks
        able = tuple(layer for layer in blocks if view.can_mask_attention(layer))
        if not able or (isinstance(self.layers, tuple) and able != blocks):
            is_without = {layer: view.blocks[layer].attention is None for layer in blocks if layer not in able}
            unable = min(is_without, key=lambda layer: (is_without[layer], layer))
            why = "no attention" if is_without[unable] else "attention without a norm ln1 of its own before it"
            raise MelensError(f"Block {unable} has {why}, so site={self.site} cannot mask it; site=resid_pre can.")
        return able

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
        view = view_model(model)
        chosen = self._on(view).fixed
        assert chosen is not None
        if refresh and self.select not in BY_GAIN:
            raise MelensError(f"refresh chooses the dims by the gains of ln1, which select={self.select} does not use.")
        if view.bridge is not None and self.site != "resid_pre":
            shared = [layer for layer in chosen.blocks if view.blocks[layer].ln1_is_shared]
            if shared:
                raise MelensError(
                    f"Block {shared[0]} of this bridge shares ln1 between attention and another part: mask the plain "
                    "transformers model, or use site=resid_pre."
                )
        count = 0 if self.select == "massive" else count_dims(self.rate, view.d_model)
        factors = DimFactors(view, chosen, select=self.select, count=count, strength=self.strength, refresh=refresh)
        if view.bridge is not None:
            find_cache_by_any_name(view.bridge)
        caches = bool(getattr(view.base.config, "use_cache", False))
        finder = TokenFinder(self.positions, caches_by_default=caches)
        return InstalledMask(view, chosen.blocks, self.site, finder, factors)

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
        """Write `wemask.json` into a folder, with the dims as they were chosen on the model last masked.

        Raises:
            MelensError: the mask was never on a model, or the folder cannot be written to.
        """
        fixed = self.fixed or self._last.get("fixed")
        if fixed is None:
            raise MelensError("Nothing to save yet: call mask.on(model) first.")
        content = {"melens": metadata.version("melens"), "wemask": self.to_dict(), **asdict(fixed)}
        folder = Path(folder)
        if not folder.is_dir():
            raise MelensError(f"There is no folder {folder} to save the mask in.")
        return write_text(folder / MASK_FILE, json.dumps(content, indent=2) + "\n")

    @classmethod
    @checked
    def load(cls, folder: Folder) -> WeMask:
        """Read what `save` wrote: a mask with its dims, for that model alone.

        Raises:
            MelensError: no such file, or one that this version's `save` did not write.
        """
        content = read_mask(folder)
        try:
            dims = content["dims"]
            by_block = None if dims is None else {int(layer): tuple(chosen) for layer, chosen in dims.items()}
            fixed = FixedDims(by_block, tuple(content["blocks"]), dict(content["model"]))
            return cls(**content["wemask"], fixed=fixed)
        except (ValueError, TypeError, AttributeError) as error:
            raise no_mask(folder) from error
