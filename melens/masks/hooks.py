"""Put a mask on a model: the hooks that carry it out.

1. A hook on the model reads from the arguments of each forward call which tokens are masked (`tokens.py`).
2. A hook in each masked block multiplies the dims of these tokens in what enters a module (`Block.entries`). On a
   bridge that is a hook point, which fires in a plain call, `run_with_cache`, a generation and `melens.trace` alike.
3. When the call ends, a hook on the model checks that every masked block was reached.
4. A call that masks nothing, as a decode step does, runs without the hooks in the blocks: PyTorch takes longer for a
   module with a hook, whatever the hook does.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property, wraps
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from melens.analysis.me_layer import Criterion
from melens.analysis.metrics import abs_max, abs_median
from melens.errors import MelensError
from melens.masks.dims import DimFactors
from melens.masks.tokens import Call, TokenFinder
from melens.models.layout import listed
from melens.models.view import Block, ModelView
from melens.printing import Summary
from melens.tracing.resume import is_skipped
from melens.tracing.twin import Inputs, hidden_of, with_hidden

__all__ = ["InstalledMask"]


_SWITCHING = threading.Lock()  # for all masks: a lock of a mask's own could not be copied with its model


class InstalledMask(Summary):
    """A mask on a model: `remove()` takes it off.

    Compiled code is compiled anew around the hooks, which are left out of it; that of other models stays.

    Attributes:
        layers: the blocks that it masks.
    """

    def __init__(
        self, view: ModelView, layers: Sequence[int], site: str, finder: TokenFinder, factors: DimFactors
    ) -> None:
        """Attach the hooks to these blocks; massive tokens are looked for in what enters the first."""
        self.layers = tuple(layers)
        self.first, self._site = min(layers), site
        self._finder, self.factors = finder, factors
        self._calls: dict[int, Call] = {}  # by thread
        self.idle: set[int] = set()  # threads whose forward call masks nothing
        self.seen: dict[int, Tensor] = {}  # what went into ln1, by thread
        self.carried = f"melens_mask_{id(self)}"
        self._signature = inspect.signature(view.base.forward)
        self._expected = [(layer, view.blocks[layer].module) for layer in self.layers]
        self._removers: list[Callable[[], None]] = [factors.remove]
        self._in_blocks: list[RemovableHandle] = []
        self._taken_off: list[tuple[OrderedDict[int, Any], int, Any]] = []
        self._untrained: list[_Hooks] = []  # of blocks as they are until the model is trained
        _guard_hooks()
        self._n_compiled = _n_compiled()
        try:
            self._attach(view, site)
        except BaseException:
            self.remove()
            raise

    def _heading(self) -> str:
        return f"Mask {'on' if self._removers else 'taken off'} {listed(self.layers)}, site {self._site}"

    def remove(self) -> None:
        """Take the mask off; a second time does nothing."""
        with _SWITCHING:  # what is off stays off
            self._in_blocks.clear()
            self._taken_off.clear()
        while self._removers:
            self._removers.pop()()

    def _attach(self, view: ModelView, site: str) -> None:
        keep = self._keep
        self._removers.append(view.base.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        self._removers.append(view.base.register_forward_hook(self._end, always_call=True).remove)
        for layer in self.layers:
            block = view.blocks[layer]
            hooks = _Hooks(self, layer, block)
            if layer == self.first and self._finder.detects:
                keep(block.entries["resid_pre"].register_forward_pre_hook(hooks.look, with_kwargs=True))
            if site != "resid_pre" and view.bridge is None:  # else outside what gradient checkpointing repeats
                self._untrained.append(hooks)
            if site == "ln1_in" and block.ln1_is_shared:
                self._mask_for_attention(hooks)
            else:
                hooks.on_input = block.entries[site].register_forward_pre_hook(hooks.mask_input, with_kwargs=True)
                keep(hooks.on_input)

    def _mask_for_attention(self, hooks: _Hooks) -> None:
        """Mask the input of a block's `ln1` where attention takes its output, which others may read as it is."""
        entries = hooks.block.entries
        self._keep(entries["ln1_in"].register_forward_pre_hook(hooks.before_ln1))
        self._keep(entries["attn_in"].register_forward_pre_hook(hooks.renormalise, with_kwargs=True))

    def _keep(self, handle: RemovableHandle) -> None:
        self._removers.append(handle.remove)
        self._in_blocks.append(handle)

    # --- Off and on again ---------------------------------------------------------------------------------------------

    def _switch(self) -> None:
        """Leave the blocks without hooks as long as there are forward calls under way, of which none masks anything."""
        if not self.idle or len(self.idle) < len(self._calls):
            self._put_on()
        elif not self._taken_off and not self._may_be_compiled():
            for handle in self._in_blocks:
                hooks = handle.hooks_dict_ref()
                if hooks is not None and len(hooks) == 1 and handle.id in hooks:  # beside others it keeps its place
                    self._taken_off.append((hooks, handle.id, hooks.pop(handle.id)))

    def _may_be_compiled(self) -> bool:
        """Tell whether code compiled now, or since the mask was installed, could go on without the hooks."""
        are_blocks = any(block._compiled_call_impl is not None for _, block in self._expected)
        return are_blocks or _n_compiled() != self._n_compiled

    def _put_on(self) -> None:
        while self._taken_off:
            hooks, key, hook = self._taken_off.pop()
            hooks[key] = hook
            hooks.move_to_end(key, last=False)  # before what was hooked there meanwhile

    # --- A forward call -----------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
        if module.training:  # perhaps with gradient checkpointing, which runs what is in a block once more
            while self._untrained:
                hooks = self._untrained.pop()
                self._keep(hooks.block.module.register_forward_pre_hook(hooks.carry, with_kwargs=True))
                if self._site == "ln1_in" and not hooks.block.ln1_is_shared:
                    hooks.on_input.remove()  # ln1 gets no arguments with which something could be carried
                    self._mask_for_attention(hooks)
        arguments = {**self._signature.bind_partial(*args).arguments, **kwargs} if args else kwargs
        call, thread = self._finder.find(arguments), threading.get_ident()
        is_idle = call.where is None and not call.detect and not module.training
        with _SWITCHING:
            self._calls[thread] = call
            (self.idle.add if is_idle else self.idle.discard)(thread)  # an interrupted call did not end
            self._switch()
        if module.training and self._hooks_are_repeated():
            return args, {**kwargs, self.carried: call}
        return None

    def _hooks_are_repeated(self) -> bool:
        """Tell whether gradient checkpointing repeats the hooks of a block too, as before transformers 5.23."""
        parameters = self._signature.parameters.values()
        return (
            "__call__" in GradientCheckpointingLayer.__dict__
            and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
            and any(getattr(block, "gradient_checkpointing", False) for _, block in self._expected)
        )

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        thread = threading.get_ident()
        with _SWITCHING:
            self.idle.discard(thread)
            call = self._calls.pop(thread, None)
            self._switch()
        if call is None or call.where is None or output is None:
            return
        # a block that returns what was recorded has nothing to mask
        missed = [layer for layer, block in self._expected if layer not in call.masked and not is_skipped(block)]
        if missed:
            raise MelensError(
                f"The mask did not reach block {missed[0]}, though it is installed there: its hooks were taken off, or "
                "the model was compiled without them. Install the mask again."
            )

    def call(self, kwargs: dict[str, Any] | None = None) -> Call:
        """Return what to do in the forward call that is under way; in a recomputation it comes with the arguments."""
        call = (kwargs or {}).pop(self.carried, None) or self._calls.get(threading.get_ident())
        if call is None:
            raise MelensError(
                "A masked block ran outside a forward call of its model; with gradient checkpointing this architecture "
                "cannot be masked at that site."
            )
        return call

    def detect(self, call: Call, hidden: Float[Tensor, "batch pos d"]) -> None:
        """Find the massive tokens of what enters the first masked block, where that is asked for."""
        if not call.detect:
            return
        left_out, criterion = call.n_left_out(hidden), Criterion()
        largest = abs_max(hidden).float()
        real = torch.ones_like(largest) > 0 if call.real is None else call.real[:, left_out:].to(largest.device)
        medians = torch.stack([abs_median(h[tokens]) for h, tokens in zip(hidden, real, strict=True)])
        massive = (largest > criterion.min_abs) & (largest > criterion.min_ratio * medians[:, None]) & real
        rows, columns = massive.nonzero(as_tuple=True)
        call.where = (rows, columns + left_out) if len(rows) else None

    def reached(self, call: Call, layer: int, hidden: Float[Tensor, "batch pos d"]) -> tuple[Any, ...] | None:
        """Note that a block was reached, and index the tokens to mask in what it is given; None without any."""
        call.masked.add(layer)
        return call.where_in(hidden)


def _guard_hooks() -> None:
    """Have compiled code look at a module's hooks before it runs, as it does not by default.

    Code that was compiled before a mask came would go on without it. And blocks share their code: a masked one would
    run what was compiled for another that is not.
    """
    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()  # what was compiled until now does not look


def _n_compiled() -> int:
    """Count the frames that torch.compile has looked at in this process."""
    return counters["frames"]["total"]


def _hook(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method run outside compiled code, and next to nothing where the forward call masks nothing."""
    uncompiled = torch.compiler.disable(method)

    @wraps(method)
    def hook(self: _Hooks, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling() and threading.get_ident() in self.mask.idle:
            return None
        return uncompiled(self, *args, **kwargs)

    return hook


class _Hooks:
    """What runs around one masked block. (Methods, not closures: a deep copy of the model gets its own.)"""

    def __init__(self, mask: InstalledMask, layer: int, block: Block) -> None:
        self.mask, self._layer, self.block = mask, layer, block
        self.on_input: RemovableHandle

    @cached_property
    def _passes_on(self) -> bool:
        parameters = inspect.signature(self.block.module.forward).parameters.values()
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    @_hook
    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.mask.detect(self.mask.call(), hidden_of(args, kwargs))

    @_hook
    def carry(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
        """Send along with the block's arguments what is masked: the backward pass gets the same ones again."""
        if self.mask.carried in kwargs:
            return None
        if self._passes_on and module.training and getattr(module, "gradient_checkpointing", False):
            return args, {**kwargs, self.mask.carried: self.mask.call()}
        return None

    @_hook
    def mask_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
        hidden = hidden_of(args, kwargs)
        where = self.mask.reached(self.mask.call(kwargs), self._layer, hidden)
        if where is None:
            return None
        return with_hidden(_put(hidden, where, self._masked(hidden[where])), args, kwargs)

    @_hook
    def before_ln1(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.mask.seen[threading.get_ident()] = args[0]

    @_hook
    def renormalise(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
        """Give attention what `ln1` makes of the masked tokens; what else reads `ln1` reads them whole."""
        assert self.block.ln1 is not None
        before = self.mask.seen.pop(threading.get_ident())
        where = self.mask.reached(self.mask.call(kwargs), self._layer, before)
        if where is None:
            return None
        normalised = self.block.ln1.forward(self._masked(before[where])[None])[0]
        return with_hidden(_put(hidden_of(args, kwargs), where, normalised), args, kwargs)

    def _masked(self, rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Multiply the dims of chosen tokens by what the mask leaves of them."""
        return rows * self.mask.factors(self._layer, rows)


def _put(hidden: Tensor, where: tuple[Any, ...], rows: Tensor) -> Tensor:
    """Replace tokens of a hidden state, which itself stays as it is: others may hold it."""
    if len(where) == 1:  # all
        return rows
    replaced = hidden.clone()
    replaced[where] = rows.to(hidden.dtype)
    return replaced
