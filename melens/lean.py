"""Leave out of a bridge's forward pass what nobody listens to.

A `TransformerBridge` puts a component of its own around every module of a transformers model, so that hooks can fire
everywhere: it re-implements attention eagerly, which costs memory quadratic in the sequence, makes float32 copies for
the hooks inside norms, and spends more time in Python than a GPU takes for the block. `lean_forward` puts the model's
own modules back for as long as the context lasts. Hooks on what goes into or comes out of a module fire as before; a
component with a hook further inside stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    GatedMLPBridge,
    JointGateUpMLPBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    LinearBridge,
    NormalizationBridge,
    ParallelBlockBridge,
    PositionEmbeddingsAttentionBridge,
    RMSNormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from melens.attention import FUSED, FUSED_BESIDE_EAGER, missing_as_zero

__all__ = ["KeyListener", "any_hooks", "attach_hook", "lean_forward"]

Attached = Mapping[int, Any]
"""Where a module keeps the hooks on it, by handle: the same object as long as the module lives."""

KeyListener = Callable[[int, Tensor], None]
"""Called as `listener(layer, attention)` with a float32 `[batch, head, query, key]`, a column for each wanted key."""

_ATTENTION = (PositionEmbeddingsAttentionBridge, JointQKVPositionEmbeddingsAttentionBridge)
_TRANSPARENT = (
    BlockBridge, GatedMLPBridge, JointGateUpMLPBridge, LinearBridge, NormalizationBridge, RMSNormalizationBridge,
)  # fmt: skip
"""Components that compute just what the module computes that they wrap (subclasses may not)."""

_PLAIN_BLOCKS = (BlockBridge, ParallelBlockBridge)

_INPUT_FORKS = ("use_split_qkv_input", "use_attn_in", "use_attn_result", "use_hook_mlp_in")
"""The bridge's options that route activations around the wrapped modules."""


@contextmanager
def lean_forward(
    model: TransformerBridge, keys: Sequence[int] = (), listener: KeyListener | None = None
) -> Iterator[None]:
    """Run the model's own modules wherever that fires the same hooks, and its attention through fused kernels.

    Blocks with a hook on their scores or pattern, and those whose attention no fused kernel computes, stay eager.
    Whatever happens inside, the model leaves the context as it entered it.

    Args:
        model: the bridge, with its hooks already attached.
        keys: key positions whose attention the listener wants.
        listener: called once a block and forward pass, whichever way the block computes its attention.
    """
    can_be_lean = not any(getattr(model.cfg, option, False) for option in _INPUT_FORKS)
    wrappers = _wrappers(model)
    heard = {hook for wrapper in wrappers for hook, attached in wrapper.hooks if any(attached)}
    captures = {handle.id for block in model.blocks for handle in getattr(block, "_capture_hook_handles", ())}
    left_out: list[_Wrapper] = []
    n_eager = 0
    with ExitStack() as stack:
        stack.callback(_put_back, left_out)
        for wrapper in wrappers:
            if (
                can_be_lean
                and wrapper.can_be_left_out
                and heard.isdisjoint(wrapper.inside)
                and not _has_torch_hooks(wrapper, captures)
            ):
                left_out.append(wrapper)
                wrapper.parent._modules[wrapper.name] = wrapper.module
                _keep_rim_hooks(wrapper, heard, stack)
                if wrapper.layer is not None and listener is not None:
                    _listen_to_fused(wrapper, keys, partial(listener, wrapper.layer), stack)
            elif wrapper.layer is not None:
                n_eager += 1
                if listener is not None:
                    _listen_to_pattern(wrapper, keys, partial(listener, wrapper.layer), stack)
        _select_attention(model, FUSED_BESIDE_EAGER if n_eager else FUSED, stack)
        yield


@dataclass(frozen=True)
class _Wrapper:
    """A bridge component in its place in the transformers model.

    Attributes:
        component, module: the bridge component and the transformers module that it wraps.
        parent, name: where in the transformers model it stands.
        hook_in, hook_out: its hooks at the rim, on what goes into and comes out of the wrapped module.
        hooks: the ids of all its hooks but those of components further inside the wrapped module, each with the
            mappings that hold what is attached to it.
        inside: the ids of its hooks that are not at the rim, which the wrapped module alone would not fire.
        torch_hooks: what holds PyTorch's own hooks on it and on the components in it that the module does not have.
        can_be_left_out: whether the wrapped module computes the same.
        layer: of an attention component, its block.
    """

    component: Any
    module: Any
    parent: nn.Module
    name: str
    hook_in: HookPoint
    hook_out: HookPoint
    hooks: tuple[tuple[int, tuple[Attached, ...]], ...]
    inside: frozenset[int]
    torch_hooks: tuple[Attached, ...]
    can_be_left_out: bool
    layer: int | None


def _put_back(left_out: list[_Wrapper]) -> None:
    for wrapper in left_out:
        wrapper.parent._modules[wrapper.name] = wrapper.component


def _keep_rim_hooks(wrapper: _Wrapper, heard: set[int], stack: ExitStack) -> None:
    if id(wrapper.hook_in) in heard:
        fire_in = _fire_hook_in(wrapper.hook_in)
        stack.callback(wrapper.module.register_forward_pre_hook(fire_in, with_kwargs=True).remove)
    if id(wrapper.hook_out) in heard:
        stack.callback(wrapper.module.register_forward_hook(_fire_hook_out(wrapper.hook_out)).remove)


_WRAPPERS: WeakKeyDictionary[nn.Module, tuple[_Wrapper, ...]] = WeakKeyDictionary()


def _wrappers(model: TransformerBridge) -> tuple[_Wrapper, ...]:
    """List the components that can be left out and all attention components; found once a model."""
    if model not in _WRAPPERS:
        attention = {id(block._modules.get("attn")): layer for layer, block in enumerate(model.blocks)}
        # Some blocks reach into their components as they run; theirs must stay.
        needed = {id(part) for block in model.blocks if type(block) not in _PLAIN_BLOCKS for part in block.modules()}
        _WRAPPERS[model] = tuple(
            _wrapper(component, parent, name, attention.get(id(component)), is_needed=id(component) in needed)
            for parent in model.original_model.modules()
            if not isinstance(parent, GeneralizedComponent)
            for name, component in parent._modules.items()
            if type(component) in _TRANSPARENT or id(component) in attention
        )
    return _WRAPPERS[model]


def _wrapper(component: Any, parent: nn.Module, name: str, layer: int | None, *, is_needed: bool) -> _Wrapper:
    module, hook_in, hook_out = component.original_component, component.hook_in, component.hook_out
    elsewhere = set(map(id, module.modules()))
    own = [part for part in component.modules() if id(part) not in elsewhere]
    hooks = tuple(
        (id(hook), (hook._forward_hooks, hook._backward_hooks)) for hook in own if isinstance(hook, HookPoint)
    )
    inside = frozenset(hook for hook, _ in hooks) - {id(hook_in), id(hook_out)}
    parts = (part for part in own if not isinstance(part, HookPoint))
    torch_hooks = tuple(
        attached for part in parts for attached in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
    )
    if layer is not None:
        can_be_left_out = isinstance(component, _ATTENTION)
    elif isinstance(component, NormalizationBridge):
        can_be_left_out = component.use_native_layernorm_autograd
    else:
        can_be_left_out = not getattr(component, "_use_processed_weights", False)
    return _Wrapper(
        component,
        module,
        parent,
        name,
        hook_in,
        hook_out,
        hooks,
        inside,
        torch_hooks,
        can_be_left_out and not is_needed,
        layer,
    )


def any_hooks(hook_point: HookPoint) -> bool:
    """Whether a hook of any kind is attached to a hook point."""
    return bool(hook_point._forward_hooks or hook_point._backward_hooks)


def _has_torch_hooks(wrapper: _Wrapper, captures: set[int]) -> bool:
    """Whether PyTorch's own hooks are on a component, but for the block's captures, which only matter to forks."""
    return any(handle_id not in captures for attached in filter(None, wrapper.torch_hooks) for handle_id in attached)


def _fire_hook_in(hook_in: HookPoint) -> Callable[..., tuple[Any, Any]]:
    def fire(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (hook_in(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hook_in(kwargs["hidden_states"])}

    return fire


def _fire_hook_out(hook_out: HookPoint) -> Callable[..., Any]:
    def fire(module: nn.Module, args: Any, output: Any) -> Any:
        return (hook_out(output[0]), *output[1:]) if isinstance(output, tuple) else hook_out(output)

    return fire


# --- Attention --------------------------------------------------------------------------------------------------------


_Report = Callable[[Tensor], None]


def _listen_to_fused(wrapper: _Wrapper, keys: Sequence[int], report: _Report, stack: ExitStack) -> None:
    wanted = {"melens_keys": tuple(keys), "melens_listener": report}

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | wanted  # transformers passes it on to the attention function

    stack.callback(wrapper.module.register_forward_pre_hook(ask, with_kwargs=True).remove)


def _listen_to_pattern(wrapper: _Wrapper, keys: Sequence[int], report: _Report, stack: ExitStack) -> None:
    hook_pattern: HookPoint | None = getattr(wrapper.component, "hook_pattern", None)
    if hook_pattern is None:
        return

    def hear(pattern: Float[Tensor, "batch head query key"]) -> None:
        within = [position for position in keys if position < pattern.shape[-1]]
        report(missing_as_zero(pattern[..., within].float(), keys, pattern.shape[-1]))

    attach_hook(hook_pattern, hear, stack)


def attach_hook(hook_point: HookPoint, listen: Callable[[Tensor], None], stack: ExitStack) -> None:
    """Let a listener hear what passes a hook point, in the layout of its documentation, until the stack unwinds."""

    def hear(activation: Tensor, hook: HookPoint) -> None:
        listen(activation)

    handle = hook_point.add_hook(hear)
    stack.callback(hook_point.fwd_hooks.remove, handle)
    stack.callback(handle.hook.remove)


def _select_attention(model: TransformerBridge, name: str, stack: ExitStack) -> None:
    modules = [model.original_model]
    modules += [wrapper.module for wrapper in _wrappers(model) if wrapper.layer is not None]
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    for config in configs.values():
        stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = name
