"""Run the transformers model that is inside a bridge without the bridge: its plain twin.

A `TransformerBridge` puts a component of its own around every module of a transformers model, so that hooks can fire
everywhere. That computes attention eagerly, in memory quadratic in the length, and spends more time in Python than a
GPU takes for a block. `running` is how melens runs a bridge's model instead:

1. `Twin` copies what contains modules (blocks, attention, ...) without the components in between. What holds weights is
   the bridge's own module, and a copy shares its original's weights, buffers and PyTorch hooks. The twin lives with its
   bridge, and is made anew once a module was replaced, patched or switched (`is_current`).
2. On the way it notes where in the twin the tensor of each hook point passes: into a module, or out of it.
3. Plain forward hooks there call the recorders, and fire the bridge's hook points that somebody hooked; attention is
   computed by `melens.tracing.attention`.
4. What has no place in the twin (a hook inside a component, a component that was changed, folded weights) is run by the
   bridge itself, and a warning says why and what it costs.
"""

from __future__ import annotations

import copy
import math
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge import generalized_components as tl
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from melens.errors import MelensError
from melens.tracing.attended import Attended, FromPattern
from melens.tracing.attention import FUSED, pattern_of, uses_attention_function
from melens.tracing.resume import is_skipped
from melens.tracing.sites import Sites

__all__ = [
    "Inputs", "Place", "Record", "RecordAttention", "Twin", "Way", "hidden_of", "how_run", "is_hooked", "running",
    "with_hidden",
]  # fmt: skip

Record = Callable[[Tensor], None]

RecordAttention = Callable[[int, Attended], None]
"""Called as `record(layer, attended)`."""

Way = Literal["fast", "bridge"]
"""What runs: the plain twin, or the bridge with TransformerLens's components."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a module's forward call, as a forward pre-hook takes and returns them."""

_Fire = Callable[[Tensor], Tensor | None]
"""Called with an activation; what it returns, if anything, goes on in its place."""

_KNOWN = (tl.BlockBridge, tl.GatedMLPBridge, tl.JointGateUpMLPBridge, tl.LinearBridge, tl.NormalizationBridge)
"""Components whose `hook_in` and `hook_out` are what enters and leaves their module. Whether it is so of another kind,
attention aside, `melens.tracing.verification` finds out."""

_USES_PATTERN = (tl.JointQKVAttentionBridge, tl.PositionEmbeddingsAttentionBridge)
"""Components that compute attention from the pattern that has passed `hook_pattern`; others let their module do it, and
a hook there sees what has been used already."""

_LIBRARIES = ("transformer_lens.", "melens.", "accelerate.")
"""Whose classes of components, and whose PyTorch hooks on them, change nothing that the twin computes."""


class Place(NamedTuple):
    """Where the tensor of a hook point passes in the transformers model.

    Attributes:
        name, module: a module of the twin.
        is_input: whether it enters the module, or is the first that the module returns.
        projection: takes what enters the module to the tensor: the part of a joint projection (q, k, v; gate, up) that
            the bridge split off and the module does not compute apart.
        is_known: whether the place follows from the kind of component.
    """

    name: str
    module: nn.Module
    is_input: bool
    projection: nn.Module | None = None
    is_known: bool = True

    def attach(self, fire: _Fire, network: nn.Module | None = None) -> RemovableHandle:
        """Call a function with what passes here, or at this place of another model of the class."""
        module = self.module if network is None else network.get_submodule(self.name)
        if self.projection is not None:
            fire = partial(_on_projected, fire, self.projection)
        if self.is_input:
            # a component's hook point fires before the module, with whatever others hooked onto that, is called
            return module.register_forward_pre_hook(partial(_on_input, fire), prepend=True, with_kwargs=True)
        return module.register_forward_hook(partial(_on_output, fire))


def _on_projected(fire: _Fire, projection: nn.Module, activation: Tensor) -> None:
    fire(projection(activation))


def _on_input(fire: _Fire, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
    changed = fire(hidden_of(args, kwargs))
    return None if changed is None else with_hidden(changed, args, kwargs)


def _on_output(fire: _Fire, module: nn.Module, args: Any, output: Any) -> Any:
    is_several = isinstance(output, tuple | list)
    changed = fire(output[0] if is_several else output)
    return type(output)((changed, *output[1:])) if changed is not None and is_several else changed


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden state among the arguments of a module's forward call."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Return the arguments with another hidden state in its place."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


class Twin:
    """The transformers model of a bridge without the bridge's components, on the same weights.

    Attributes:
        network: the model; only what contains a component is a copy.
        places: by the id of a hook point, where its tensor passes.
        attention: by block, its attention module.
        patterns: by the id of a hook point of attention patterns, its block.
        read_only: ids of those among them where the bridge discards what a hook returns.
        is_fused: whether `melens.tracing.attention` computes the attention of all blocks; else transformers does,
            eagerly.
        why_not: why the twin does not compute what the bridge does, in a clause; empty if it does.
    """

    @classmethod
    def of(cls, model: TransformerBridge) -> Twin:
        """Return the twin that lives with a bridge, or a new one where the bridge is not as it was."""
        twin = _TWINS.get(model)
        if twin is None or not twin.is_current(model):
            twin = _TWINS[model] = cls(model)
        return twin

    def __init__(self, model: TransformerBridge) -> None:
        self.places: dict[int, Place] = {}
        self.attention: dict[int, nn.Module] = {}
        self.patterns: dict[int, int] = {}
        self.read_only: set[int] = set()
        self.why_not = "its weights were folded (compatibility mode, process_weights)" if _is_folded(model) else ""
        self._layers = {id(block._modules.get("attn")): layer for layer, block in enumerate(model.blocks)}
        self._plain: dict[int, nn.Module] = {}
        self._copied: list[tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = []
        self._components: list[tuple[nn.Module, str, Any, type, nn.Module | None]] = []
        self._splits: list[tuple[Any, Sequence[nn.Module], Callable[..., Any]]] = []
        self._configs: dict[int, tuple[Any, Any, Any]] = {}  # by id: a config, as it is now, and the twin's
        self._deepcopied: dict[int, Any] = {}
        self.network: Any = self._without_components(model.original_model, "")
        self.is_fused = all(map(uses_attention_function, self.attention.values()))
        for *_, config in self._configs.values():
            config._attn_implementation = FUSED if self.is_fused else "eager"

    def is_current(self, model: TransformerBridge) -> bool:
        """Tell whether the bridge is as it was: each component in its place and as its class makes it, each copied
        module with the same attributes, parts and config, each joint projection split into what it holds."""
        return (
            not self.why_not
            and not _is_folded(model)
            and all(
                component._modules["_original_component"] is original
                and type(component) is kind
                and parent._modules.get(key) is component
                and not _what_was_done_to(component, "")
                for parent, key, component, kind, original in self._components
            )
            and all(_ids(vars(each)) == own and _ids(each._modules) == parts for each, own, parts in self._copied)
            and all(vars(config) == vars(before) for config, before, _ in self._configs.values())
            and all(_holds_the_same(*split) for split in self._splits)
        )

    def _without_components(self, module: nn.Module, name: str) -> nn.Module:
        component = module if isinstance(module, GeneralizedComponent) else None
        original: Any = module if component is None else component._modules["_original_component"]
        while isinstance(original, GeneralizedComponent):
            self.why_not = self.why_not or f"another bridge was put around {name}"
            original = original._modules["_original_component"]
        if id(original) not in self._plain:  # a model may hold one module in several places
            prefix = f"{name}." if name else ""
            own = original._modules.items()
            parts = {key: part and self._without_components(part, prefix + key) for key, part in own}
            for key, part in own:
                if isinstance(part, GeneralizedComponent):
                    self._components.append((original, key, part, type(part), part._modules["_original_component"]))
            is_plain = all(part is original._modules[key] for key, part in parts.items())
            keep = is_plain and not uses_attention_function(original)
            self._plain[id(original)] = original if keep else self._copy(original, parts, name)
            if not keep:
                self._copied.append((original, _ids(vars(original)), _ids(original._modules)))
        if component is not None:
            self._note(component, self._plain[id(original)], name)
        return self._plain[id(original)]

    def _copy(self, module: nn.Module, parts: Mapping[str, nn.Module | None], name: str) -> nn.Module:
        """Make an object of the same class with the same weights, buffers and PyTorch hooks, around other parts."""
        twin: nn.Module = object.__new__(type(module))
        vars(twin).update(vars(module), _modules=dict(parts))
        if not is_skipped(module):
            for attribute in ("forward", "_old_forward"):  # accelerate's bring what goes in to the module's device
                if attribute in vars(module):
                    vars(twin)[attribute] = self._bound_to(twin, vars(module)[attribute], module, name)
        if "config" in vars(module):
            config = vars(module)["config"]
            if id(config) not in self._configs:
                self._configs[id(config)] = config, copy.deepcopy(config), copy.deepcopy(config, self._deepcopied)
            vars(twin)["config"] = self._configs[id(config)][-1]
        return twin

    def _bound_to(self, twin: nn.Module, forward: Any, module: nn.Module, name: str) -> Any:
        if isinstance(forward, types.MethodType) and forward.__self__ is module:
            return types.MethodType(forward.__func__, twin)
        if isinstance(forward, partial) and forward.args[:1] == (module,):
            return partial(forward.func, twin, *forward.args[1:], **forward.keywords)
        self.why_not = self.why_not or f"{name} has a forward that is not its class's"
        return forward

    def _note(self, component: Any, plain: nn.Module, name: str) -> None:
        """Note where the tensors of a component's hook points pass, and what was done to the component."""
        self.why_not = self.why_not or _what_was_done_to(component, name)
        inside = component._modules  # read past `__getattr__`, which takes longer than all the rest
        layer = self._layers.get(id(component))
        is_known = layer is not None or isinstance(component, _KNOWN)
        self.places[id(inside["hook_in"])] = Place(name, plain, is_input=True, is_known=is_known)
        self.places[id(inside["hook_out"])] = Place(name, plain, is_input=False, is_known=is_known)
        if layer is None and not isinstance(component, tl.JointGateUpMLPBridge):
            return
        for key, part in inside.items():  # some wrap a module that the model keeps calling itself (GPT-2's o)
            own = part._modules.get("_original_component") if isinstance(part, GeneralizedComponent) else None
            if own is None or id(part._modules["hook_in"]) in self.places:
                continue
            self._components.append((component, key, part, type(part), own))
            if id(own) in self._plain:
                self._note(part, self._plain[id(own)], f"{name}.{part.name}")
            elif key in ("o", "out"):
                self.why_not = self.why_not or f"the module of {name}.{part.name} was replaced in its component alone"
        if layer is not None:
            self.attention[layer] = plain
            if "hook_pattern" in inside:
                self.patterns[id(inside["hook_pattern"])] = layer
                if not isinstance(component, _USES_PATTERN):
                    self.read_only.add(id(inside["hook_pattern"]))
        if isinstance(component, tl.JointQKVAttentionBridge):
            self._note_joint(component, plain, name, "qkv", ("q", "k", "v"), component.split_qkv_matrix)
        elif isinstance(component, tl.JointGateUpMLPBridge):
            self._note_joint(component, plain, name, "gate_up", ("gate", "in"), component.split_gate_up_matrix)

    def _note_joint(
        self, component: Any, plain: nn.Module, name: str, joint: str, names: Sequence[str], split: Callable[..., Any]
    ) -> None:
        if joint in component._modules:  # which the bridge never calls: a hook there does not fire
            self.places.pop(id(component._modules[joint].hook_in), None)
            self.places.pop(id(component._modules[joint].hook_out), None)
        parts = [getattr(component, part) for part in names]
        for part in parts:
            self.why_not = self.why_not or _what_was_done_to(part, f"{name} ({part.name})")
            projection = part.original_component
            self.places[id(part.hook_out)] = Place(name, plain, is_input=True, projection=projection, is_known=False)
        self._splits.append((component, [part.original_component for part in parts], split))
        if not _holds_the_same(*self._splits[-1]):
            self.why_not = self.why_not or f"the projections that it split off {name} were changed apart from that"


def _is_folded(model: TransformerBridge) -> bool:
    return model.compatibility_mode or getattr(model, "_weights_processed", False)


_FORWARDS: dict[type, Any] = {}
"""By class of component, the library's own forward."""


def _what_was_done_to(component: Any, name: str) -> str:
    """Say what makes a component compute something else than its module; nothing if nothing does."""
    own, kind = vars(component), type(component)
    if _FORWARDS.get(kind) is not kind.forward:  # looked at once: there are hundreds of components of few classes
        if not kind.__module__.startswith(_LIBRARIES):
            return f"{name} has a component of the class {kind.__name__}"
        if not kind.forward.__module__.startswith(_LIBRARIES):
            return f"the forward of the class {kind.__name__}, of the component of {name}, was replaced"
        _FORWARDS[kind] = kind.forward
    if "forward" in own and "_hf_hook" not in own:  # accelerate's brings the weights, and nothing else
        return f"the component of {name} has a forward that is not its class's"
    for hooks in (component._forward_hooks, component._forward_pre_hooks, component._backward_hooks):
        if hooks and not all((getattr(hook, "__module__", "") or "").startswith(_LIBRARIES) for hook in hooks.values()):
            return f"there is a PyTorch hook on the component of {name}"
    return ""


def _ids(values: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(map(id, values.values()))


_TWINS: WeakKeyDictionary[TransformerBridge, Twin] = WeakKeyDictionary()

_SPLIT: WeakKeyDictionary[nn.Module, list[tuple[int, int, int]]] = WeakKeyDictionary()
"""By component, the weights with which it was last found to be split as its joint projection is."""


def _holds_the_same(component: Any, parts: Sequence[nn.Module], split: Callable[..., Sequence[nn.Module]]) -> bool:
    """Tell whether what a component split off a joint projection still holds the same: the parts may be edited.

    They are compared anew once a weight has changed. Only a part changed in place behind autograd's back
    (`weight.data.mul_`) goes unnoticed.
    """
    for part in parts:  # what the joint projection knows nothing of; accelerate's forward brings the weights
        is_patched = "forward" in vars(part) and "_hf_hook" not in vars(part)
        if part._forward_hooks or part._forward_pre_hooks or is_patched:
            return False
    weights = [weight for part in (component.original_component, *parts) for weight in part.parameters()]
    seen = [(id(weight), weight.data_ptr(), weight._version) for weight in weights]
    if _SPLIT.get(component) == seen or any(weight.is_meta for weight in weights):  # offloaded: not edited
        return True
    with torch.no_grad():
        is_same = all(
            now.data_ptr() == then.data_ptr() or torch.equal(now, then.to(now))
            for part, anew in zip(parts, split(component.original_component), strict=True)
            for now, then in zip(part.parameters(), anew.parameters(), strict=True)
        )
    if is_same:
        _SPLIT[component] = seen
    return is_same


# --- Running ----------------------------------------------------------------------------------------------------------

_RUNNING: WeakSet[TransformerBridge] = WeakSet()

_WARNED: WeakKeyDictionary[TransformerBridge, set[str]] = WeakKeyDictionary()


@contextmanager
def running(
    model: TransformerBridge,
    recorders: Sequence[tuple[HookPoint, Record]] = (),
    record_attention: RecordAttention | None = None,
    *,
    way: Way = "fast",
) -> Iterator[Any]:
    """Give the transformers model to call for a measurement: the bridge's twin, or the model inside the bridge.

    Hooks on the bridge take effect either way, and are as they were when the context ends.

    Args:
        model: the bridge.
        recorders: what records the activations that pass hook points.
        record_attention: called once a block with attention and forward pass.
        way: "bridge" runs the bridge where the twin could be run, too.

    Raises:
        MelensError: within another such context of the same model.
    """
    if model in _RUNNING:
        raise MelensError("This model is being measured already, by a trace or a comparison: end that first.")
    hooked = [hook_point for hook_point in Sites.of(model).hook_points if is_hooked(hook_point)]
    with ExitStack() as stack:
        _RUNNING.add(model)
        stack.callback(_RUNNING.discard, model)
        if way == "fast":
            twin = Twin.of(model)
            why_not = _why_not(twin, hooked, [hook_point for hook_point, _ in recorders])
            if not why_not:
                _attach(twin, hooked, recorders, record_attention, stack)
                yield twin.network
                return
            warned = _WARNED.setdefault(model, set())
            if why_not not in warned:
                warned.add(why_not)
                warnings.warn(
                    "This model is run through TransformerLens's own components, in about 4 times the time and in "
                    f"memory quadratic in the length: {why_not}.",
                    stacklevel=3,
                )
        for hook_point, record in recorders:
            _record_at(hook_point, record, stack)
        if record_attention is not None:
            _record_patterns(model, record_attention, stack)
        yield model.original_model


def how_run(model: TransformerBridge, sites: Iterable[str]) -> tuple[str, list[int]]:
    """Return what of a measurement depends on the sites where it records: two that agree in it give the same numbers.

    That is why the bridge has to be run, empty for its twin, and the blocks whose attention forms the pattern.
    """
    recorded = [at.hook_point for site in sites for at in Sites.of(model).find(site) if at.hook_point is not None]
    twin = Twin.of(model)
    return _why_not(twin, [], recorded), sorted({twin.patterns[id(at)] for at in recorded if id(at) in twin.patterns})


def is_hooked(hook_point: HookPoint) -> bool:
    """Tell whether a hook of any kind is attached to a hook point."""
    return bool(hook_point._forward_hooks or hook_point._forward_pre_hooks or hook_point._backward_hooks)


def _why_not(twin: Twin, hooked: Sequence[HookPoint], recorded: Sequence[HookPoint]) -> str:
    """Say why the bridge has to be run, in a clause; nothing if the twin will do."""
    for hook_point in (*recorded, *hooked):
        if id(hook_point) not in twin.places and id(hook_point) not in twin.patterns:
            return f"{hook_point.name} is inside one of them"
    for hook_point in hooked:  # which may change what passes
        if id(hook_point) in twin.read_only:
            return f"its attention discards what a hook on {hook_point.name} returns"
        place = twin.places.get(id(hook_point))
        if not twin.is_fused if place is None else place.projection is not None:
            return f"a hook on {hook_point.name} takes effect only there"
    return twin.why_not


def _attach(
    twin: Twin,
    hooked: Sequence[HookPoint],
    recorders: Sequence[tuple[HookPoint, Record]],
    record_attention: RecordAttention | None,
    stack: ExitStack,
) -> None:
    """Put hooks on a twin that call the recorders and fire the hook points which somebody hooked."""
    shape: list[int] = []

    def note_shape(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        shape[:] = args[0].shape

    stack.callback(twin.network.get_input_embeddings().register_forward_pre_hook(note_shape).remove)
    fired = {id(hook_point): hook_point for hook_point in hooked}
    called: list[tuple[int, _Fire]] = []
    for hook_point, record in recorders:
        key = id(hook_point)
        if key in fired or key in twin.patterns or hook_point.hook_conversion is not None:
            fired[key] = hook_point
            _record_at(hook_point, record, stack)
        else:
            called.append((key, record))  # without the hook point, which would take longer
    at_pattern = {twin.patterns[key]: hook_point for key, hook_point in fired.items() if key in twin.patterns}
    at_places = [(twin.places[key], fire) for key, fire in (*fired.items(), *called) if key not in twin.patterns]
    at_places.sort(key=lambda at: at[0].projection is None)  # what is split off an input sees it as the others leave it
    for place, fire in at_places:
        stack.callback(place.attach(partial(_by_prompt, fire, shape)).remove)
    for layer, attention in twin.attention.items():
        if record_attention is not None or layer in at_pattern:
            wanted = _Wanted(record_attention and partial(record_attention, layer), at_pattern.get(layer))
            stack.callback(wanted.attach(attention, is_fused=twin.is_fused).remove)


def _by_prompt(fire: _Fire, shape: Sequence[int], activation: Tensor) -> Tensor | None:
    """Give `[batch, pos, ...]` where a block works on `[batch · pos, ...]` (OPT's FFN, Llama 4's experts)."""
    if activation.ndim != 2 or len(activation) != math.prod(shape):
        return fire(activation)
    changed = fire(activation.unflatten(0, shape))
    return None if changed is None else changed.reshape(activation.shape)


@dataclass(frozen=True)
class _Wanted:
    """What is wanted of a block's attention: what it pays to keys, to be recorded, and the pattern, to fire with."""

    record: Callable[[Attended], None] | None
    fire: _Fire | None

    def attach(self, attention: nn.Module, *, is_fused: bool) -> RemovableHandle:
        if is_fused:
            return attention.register_forward_pre_hook(self._pass_on, with_kwargs=True)
        return attention.register_forward_hook(self._read)

    def _pass_on(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Give a transformers attention module arguments more, which it hands on to its attention function."""
        wanted = {"melens_record": self.record, "melens_pattern": self.fire}
        return args, kwargs | wanted

    def _read(self, module: nn.Module, args: Any, output: Any) -> None:
        """Read the pattern that eager attention returns after its output; a few architectures return none."""
        others = output[1:] if isinstance(output, tuple | list) else ()
        for pattern in [other for other in others if isinstance(other, Tensor) and other.ndim == 4][:1]:
            if self.fire is not None:
                self.fire(pattern)
            if self.record is not None:
                self.record(FromPattern(pattern))


def _record_at(hook_point: HookPoint, record: Record, stack: ExitStack) -> None:
    """Record what passes a hook point, in the layout of its documentation, until the stack unwinds."""

    def on_activation(activation: Tensor, hook: HookPoint) -> None:
        record(activation)

    handle = hook_point.add_hook(on_activation)
    stack.callback(hook_point.fwd_hooks.remove, handle)
    stack.callback(handle.hook.remove)


def _record_patterns(model: TransformerBridge, record: RecordAttention, stack: ExitStack) -> None:
    """Record a block's attention from the bridge's own patterns."""

    def on_pattern(layer: int, pattern: Float[Tensor, "batch head query key"]) -> None:
        record(layer, pattern_of(model.blocks[layer].attn.original_component, pattern))

    for layer, block in enumerate(model.blocks):
        hook_point = getattr(block._modules.get("attn"), "hook_pattern", None)
        if hook_point is not None:
            _record_at(hook_point, partial(on_pattern, layer), stack)
