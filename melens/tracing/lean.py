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
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    GatedMLPBridge,
    JointGateUpMLPBridge,
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    LinearBridge,
    NormalizationBridge,
    ParallelBlockBridge,
    PositionEmbeddingsAttentionBridge,
    RMSNormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from melens.errors import MelensError
from melens.models.kv_cache import cache_hooks
from melens.tracing.attention import FUSED, FUSED_BESIDE_EAGER, eager_function, missing_as_zero

__all__ = [
    "KeyListener",
    "Listener",
    "any_hooks",
    "hear_input",
    "hear_output",
    "is_inside_attention",
    "keep_whole",
    "lean_forward",
]

Listener = Callable[[Tensor], None]

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
    model: TransformerBridge,
    listeners: Sequence[tuple[HookPoint, Listener]] = (),
    keys: Sequence[int] = (),
    key_listener: KeyListener | None = None,
) -> Iterator[None]:
    """Run the model's own modules wherever that fires the same hooks, and its attention through fused kernels.

    Blocks with a hook on their scores or pattern, and those whose attention no fused kernel computes, stay eager.
    Whatever happens inside, the model leaves the context as it entered it.

    Args:
        model: the bridge, with the hooks already attached that may change something.
        listeners: what only listens, at most one a hook point, called with each activation that passes there.
        keys: key positions whose attention `key_listener` wants.
        key_listener: called once a block and forward pass, whichever way the block computes its attention.

    Raises:
        MelensError: within another lean forward pass of the same model.
    """
    can_be_lean = model not in _WHOLE and not any(getattr(model.cfg, option, False) for option in _INPUT_FORKS)
    parts = _parts(model)
    if parts.is_in_use:
        raise MelensError("This model is in a lean forward pass (a trace, a comparison) already: end it first.")
    hooked = {hook for hook, attached in parts.hooks if attached}
    idle = {handle.id for block in model.blocks for handle in getattr(block, "_capture_hook_handles", ())}
    idle.update(*(cache_hooks(wrapper.component) for wrapper in parts.wrappers if wrapper.layer is not None))
    # Captures of a block's input only matter to forks, a cache's name only with a cache.
    stay = {number for number, attached in parts.torch_hooks if attached and not idle.issuperset(attached)}
    waiting = {id(hook_point): (hook_point, listen) for hook_point, listen in listeners}
    heard = hooked | waiting.keys()
    heard_inside = {parts.inside[hook] for hook in parts.inside.keys() & heard}
    stay |= heard_inside
    stay.update(number for number, split in parts.splits if not split.is_of_joint())
    at_rim = {parts.rim[hook] for hook in parts.rim.keys() & heard}
    staying: set[int | None] = {None}
    left_out: list[_Wrapper] = []
    handles: list[RemovableHandle] = []
    n_eager = 0
    with ExitStack() as stack:
        parts.is_in_use = True
        stack.callback(setattr, parts, "is_in_use", False)
        stack.callback(_put_back, left_out, handles)
        for number, wrapper in enumerate(parts.wrappers):
            is_called_by_holder = number in at_rim and not staying.isdisjoint(wrapper.holders)
            must_stay = number in stay or is_called_by_holder or _is_patched(wrapper)
            is_left_out = can_be_lean and wrapper.can_be_left_out and not must_stay
            if is_left_out:
                left_out.append(wrapper)
                wrapper.parent._modules[wrapper.name] = wrapper.module
                if number in at_rim:
                    _keep_rim_hooks(wrapper, hooked, waiting, handles)
            else:
                staying.add(number)
            if wrapper.layer is None:
                continue
            if is_left_out or (wrapper.delegates and number not in heard_inside):
                if key_listener is not None:
                    handles.append(_listen_to_fused(wrapper, keys, partial(key_listener, wrapper.layer)))
            else:
                n_eager += 1
                if eager_function(wrapper.module) is not None:
                    handles.append(_pass_on(wrapper.module, {"melens_eager": True}))
                if key_listener is not None:
                    _listen_to_pattern(wrapper, keys, partial(key_listener, wrapper.layer), stack)
        for hook_point, listen in waiting.values():
            _attach(hook_point, listen, stack)
        _select_attention(parts, FUSED_BESIDE_EAGER if n_eager else FUSED, stack)
        yield


_WHOLE: WeakSet[TransformerBridge] = WeakSet()


def keep_whole(model: TransformerBridge) -> None:
    """Leave nothing out of this bridge's forward passes from now on: its own modules give other numbers."""
    _WHOLE.add(model)


@dataclass(frozen=True)
class _Wrapper:
    """A bridge component in its place in the transformers model.

    Attributes:
        component, module: the bridge component and the transformers module that it wraps.
        kind: the component's class.
        parent, name: where in the transformers model it stands.
        hook_in, hook_out: its hooks at the rim, on what goes into and comes out of the wrapped module.
        can_be_left_out: whether the wrapped module computes the same.
        layer: of an attention component, its block.
        holders: numbers of the components that call this one themselves, None for one that is never left out: where
            they stay, this one fires its hooks.
        delegates: whether an attention component lets the module compute it, and that its config choose how.
    """

    component: Any
    module: Any
    kind: type
    parent: nn.Module
    name: str
    hook_in: HookPoint
    hook_out: HookPoint
    can_be_left_out: bool
    layer: int | None
    holders: tuple[int | None, ...]
    delegates: bool


@dataclass
class _Parts:
    """The components of a bridge that can be left out and all attention components, and where hooks on them are kept.

    Attributes:
        wrappers: the components.
        rim: by the id of a hook point at the rim of a component, the component's number.
        inside: the same of its other hook points, which the wrapped module alone would not fire.
        hooks: by the id of a hook point, what is attached to it: the same mappings as long as the model lives.
        torch_hooks: by the number of a component, PyTorch's own hooks on it and on what its module does not have.
        splits: by number, the components that split a joint projection of the model's.
        configs: those of the model and of its attention, which say what computes it.
        mode: whether the bridge was in its compatibility mode, and whether it had processed its weights.
        is_in_use: whether a lean forward pass is under way.
    """

    wrappers: list[_Wrapper] = field(default_factory=list)
    rim: dict[int, int] = field(default_factory=dict)
    inside: dict[int, int] = field(default_factory=dict)
    hooks: list[tuple[int, Mapping[int, Any]]] = field(default_factory=list)
    torch_hooks: list[tuple[int, Mapping[int, Any]]] = field(default_factory=list)
    splits: list[tuple[int, _Split]] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)
    mode: tuple[bool, bool] = (False, False)
    is_in_use: bool = False


class _Split:
    """The projections into which a bridge's component splits a joint one: weights of their own, perhaps edited."""

    def __init__(self, component: Any, names: Sequence[str], split: Callable[[nn.Module], Sequence[nn.Module]]) -> None:
        self._component, self._names, self._split = component, names, split
        self._seen: list[tuple[int, int, int]] = []
        self._is_of_joint = False

    def is_of_joint(self) -> bool:
        """Tell whether they are what the joint projection holds; compared anew once one has changed.

        Only a copy changed in place behind autograd's back (`weight.data.mul_`) goes unnoticed.
        """
        split = [getattr(self._component, name).original_component for name in self._names]
        weights = [weight for part in (self._component.original_component, *split) for weight in part.parameters()]
        seen = [(id(weight), weight.data_ptr(), weight._version) for weight in weights]
        if seen != self._seen:
            self._seen = seen
            self._is_of_joint = any(weight.is_meta for weight in weights) or self._compare(
                split
            )  # offloaded: not edited
        return self._is_of_joint

    @torch.no_grad()
    def _compare(self, split: Sequence[nn.Module]) -> bool:
        anew = self._split(self._component.original_component)
        pairs = [
            (now, then)
            for part, of_joint in zip(split, anew, strict=True)
            for now, then in zip(part.parameters(), of_joint.parameters(), strict=True)
        ]
        return all(now.data_ptr() == then.data_ptr() or torch.equal(now, then.to(now)) for now, then in pairs)


_PARTS: WeakKeyDictionary[nn.Module, _Parts] = WeakKeyDictionary()


def _parts(model: TransformerBridge) -> _Parts:
    """List a model's parts; found once, and anew where weights were folded or modules replaced since."""
    mode = (model.compatibility_mode, bool(getattr(model, "_weights_processed", False)))
    if model not in _PARTS or _PARTS[model].mode != mode or not _is_as_listed(_PARTS[model]):
        parts = _PARTS[model] = _Parts(mode=mode)
        attention = {id(block._modules.get("attn")): layer for layer, block in enumerate(model.blocks)}
        # Some blocks reach into their components as they run; theirs must stay.
        needed = {id(part) for block in model.blocks if type(block) not in _PLAIN_BLOCKS for part in block.modules()}
        holders = _holders(model)
        numbers: dict[int, int] = {}
        for parent in model.original_model.modules():
            if not isinstance(parent, GeneralizedComponent):
                for name, component in parent._modules.items():
                    if type(component) in _TRANSPARENT or id(component) in attention:
                        layer = attention.get(id(component))
                        held_by = tuple(numbers.get(holder) for holder in holders.get(id(component), ()))
                        numbers[id(component)] = len(parts.wrappers)
                        is_needed = id(component) in needed
                        _add_part(parts, component, parent, name, layer, held_by, is_needed=is_needed)
        attending = [wrapper.module for wrapper in parts.wrappers if wrapper.layer is not None]
        configs = [module.config for module in (model.original_model, *attending) if hasattr(module, "config")]
        parts.configs = list({id(config): config for config in configs}.values())
    return _PARTS[model]


def _is_as_listed(parts: _Parts) -> bool:
    """Tell whether every component is still in its place, of its class, and around the module that it was around."""

    def is_in_place(wrapper: _Wrapper) -> bool:
        component: Any = wrapper.parent._modules.get(wrapper.name)
        is_same = component is wrapper.component and type(component) is wrapper.kind
        return is_same and component._modules.get("_original_component") is wrapper.module

    return parts.is_in_use or all(map(is_in_place, parts.wrappers))


def _holders(model: TransformerBridge) -> dict[int, list[int]]:
    """Find which components hold which, by id, but for blocks, which leave the calling to the module that they wrap."""
    holders: dict[int, list[int]] = {}
    inside_blocks = [part for block in model.blocks for part in block.modules()]
    for holder in {id(part): part for part in (*model.original_model.modules(), *inside_blocks)}.values():
        if isinstance(holder, GeneralizedComponent) and not isinstance(holder, BlockBridge):
            for held in holder._modules.values():
                holders.setdefault(id(held), []).append(id(holder))
    return holders


def _add_part(
    parts: _Parts,
    component: Any,
    parent: nn.Module,
    name: str,
    layer: int | None,
    holders: tuple[int | None, ...],
    *,
    is_needed: bool,
) -> None:
    module, hook_in, hook_out = component.original_component, component.hook_in, component.hook_out
    elsewhere = set(map(id, module.modules()))
    own = [part for part in component.modules() if id(part) not in elsewhere]
    number = len(parts.wrappers)
    parts.rim.update({id(hook_in): number, id(hook_out): number})
    for part in own:
        if isinstance(part, HookPoint):
            if part is not hook_in and part is not hook_out:
                parts.inside[id(part)] = number
            parts.hooks.extend([(id(part), part._forward_hooks), (id(part), part._backward_hooks)])
        else:
            kept_in = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
            parts.torch_hooks.extend((number, attached) for attached in kept_in)
    delegates = False
    if layer is not None:
        can_be_fused = eager_function(module) is not None
        is_causal = getattr(module, "is_causal", False)
        delegates = type(component) is AttentionBridge and can_be_fused and is_causal
        is_joint = type(component) is JointQKVAttentionBridge and can_be_fused and is_causal
        is_known = isinstance(component, _ATTENTION) and _is_of_transformer_lens(component)
        can_be_left_out = (is_known and can_be_fused) or delegates or is_joint
    elif isinstance(component, NormalizationBridge):
        can_be_left_out = component.use_native_layernorm_autograd
    else:
        can_be_left_out = not getattr(component, "_use_processed_weights", False)
    can_be_left_out = can_be_left_out and not is_needed
    if can_be_left_out and isinstance(component, JointQKVAttentionBridge):
        parts.splits.append((number, _Split(component, ("q", "k", "v"), component.split_qkv_matrix)))
        _hear_inside(parts, number, component._modules.get("qkv"))
    elif can_be_left_out and isinstance(component, JointGateUpMLPBridge):
        parts.splits.append((number, _Split(component, ("gate", "in"), component.split_gate_up_matrix)))
        _hear_inside(parts, number, component._modules.get("gate_up"))
    parts.wrappers.append(
        _Wrapper(
            component,
            module,
            type(component),
            parent,
            name,
            hook_in,
            hook_out,
            can_be_left_out,
            layer,
            holders,
            delegates,
        )
    )


def _is_of_transformer_lens(component: nn.Module) -> bool:
    """Tell whether an attention component follows transformers' module: somebody's own subclass may compute otherwise.

    (That TransformerLens's subclasses do is what the self-check of `melens.verify` finds out.)
    """
    return type(component).__module__.startswith("transformer_lens.")


def _hear_inside(parts: _Parts, number: int, joint: Any) -> None:
    """Count the hooks of a joint projection, which the bridge splits and never calls, as inside its component."""
    if joint is not None:
        parts.inside |= {id(joint.hook_in): number, id(joint.hook_out): number}


def _is_patched(wrapper: _Wrapper) -> bool:
    """Tell whether somebody gave a component or its module a `forward` of its own; accelerate's only brings weights."""
    own, inner = wrapper.component.__dict__, wrapper.module.__dict__
    return ("forward" in own and "_hf_hook" not in own) or ("forward" in inner and "_hf_hook" not in inner)


def _put_back(left_out: list[_Wrapper], handles: list[RemovableHandle]) -> None:
    for wrapper in left_out:
        wrapper.parent._modules[wrapper.name] = wrapper.component
    for handle in handles:
        handle.remove()


def _keep_rim_hooks(
    wrapper: _Wrapper,
    hooked: set[int],
    waiting: dict[int, tuple[HookPoint, Listener]],
    handles: list[RemovableHandle],
) -> None:
    """Fire the hooks at the rim from the module; a listener that is alone there is called without the hook point."""
    for hook_point, is_input in ((wrapper.hook_in, True), (wrapper.hook_out, False)):
        hear: Callable[[Tensor], Tensor | None] | None = None
        if id(hook_point) in hooked:
            hear = hook_point
        elif id(hook_point) in waiting:
            hear = hook_point if hook_point.hook_conversion is not None else waiting.pop(id(hook_point))[1]
        if hear is not None and is_input:
            handles.append(wrapper.module.register_forward_pre_hook(hear_input(hear), with_kwargs=True))
        elif hear is not None:
            handles.append(wrapper.module.register_forward_hook(hear_output(hear)))


def is_inside_attention(model: TransformerBridge, hook_point: HookPoint) -> bool:
    """Tell whether a hook at this point keeps the attention of its block in the bridge's eager form."""
    parts = _parts(model)
    number = parts.inside.get(id(hook_point))
    return number is not None and parts.wrappers[number].layer is not None


def any_hooks(hook_point: HookPoint) -> bool:
    """Whether a hook of any kind is attached to a hook point."""
    return bool(hook_point._forward_hooks or hook_point._backward_hooks)


def hear_input(hear: Callable[[Tensor], Tensor | None]) -> Callable[..., tuple[Any, Any] | None]:
    """Make PyTorch's forward pre-hook (with kwargs) of what hears, and may replace, a module's hidden states."""

    def fire(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        changed = hear(args[0] if args else kwargs["hidden_states"])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    return fire


def hear_output(hear: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """Make PyTorch's forward hook of what hears, and may replace, the first of a module's outputs."""

    def fire(module: nn.Module, args: Any, output: Any) -> Any:
        is_several = isinstance(output, tuple | list)
        changed = hear(output[0] if is_several else output)
        return type(output)((changed, *output[1:])) if changed is not None and is_several else changed

    return fire


# --- Attention --------------------------------------------------------------------------------------------------------


def _listen_to_fused(wrapper: _Wrapper, keys: Sequence[int], report: Listener) -> RemovableHandle:
    return _pass_on(wrapper.module, {"melens_keys": tuple(keys), "melens_listener": report})


def _pass_on(attention: nn.Module, wanted: dict[str, Any]) -> RemovableHandle:
    """Give a transformers attention module arguments more, which it passes on to its attention function."""

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | wanted

    handle: RemovableHandle = attention.register_forward_pre_hook(ask, with_kwargs=True)
    return handle


def _listen_to_pattern(wrapper: _Wrapper, keys: Sequence[int], report: Listener, stack: ExitStack) -> None:
    hook_pattern: HookPoint | None = getattr(wrapper.component, "hook_pattern", None)
    if hook_pattern is None:
        return

    def hear(pattern: Float[Tensor, "batch head query key"]) -> None:
        within = [position for position in keys if position < pattern.shape[-1]]
        report(missing_as_zero(pattern[..., within].float(), keys, pattern.shape[-1]))

    _attach(hook_pattern, hear, stack)


def _attach(hook_point: HookPoint, listen: Listener, stack: ExitStack) -> None:
    """Let a listener hear what passes a hook point, in the layout of its documentation, until the stack unwinds."""

    def hear(activation: Tensor, hook: HookPoint) -> None:
        listen(activation)

    handle = hook_point.add_hook(hear)
    stack.callback(hook_point.fwd_hooks.remove, handle)
    stack.callback(handle.hook.remove)


def _select_attention(parts: _Parts, name: str, stack: ExitStack) -> None:
    for config in parts.configs:
        stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = name
