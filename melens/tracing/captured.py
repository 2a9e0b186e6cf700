"""Run short forward passes as CUDA graphs, where Python takes longer than the GPU: 512 tokens of a 4B model in half the
time.

A shape that comes for the second time is captured, with all that its probes reduce. A graph reads tokens and lengths
from the same memory in each run. While it is captured others lie there, so that it shows if something was taken from
them for good: the graph then runs on the batch at hand, and is kept if it gives what the plain run gave, bit for bit.
It runs on the model as it was: the same weights at the same addresses, no hooks, the same settings of PyTorch.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from melens.storage.cache import float32_precision
from melens.tracing.batching import BatchRule
from melens.tracing.probes import Batch, Probe
from melens.tracing.recording import Recorder, Reduced, Target
from melens.tracing.sites import Sites
from melens.tracing.twin import Twin, is_hooked

__all__ = ["ShortPasses"]

Recording = Callable[[Recorder], AbstractContextManager[Any]]
"""Gives the transformers model to call while a recorder records."""

_MOST_TOKENS, _MOST_ROWS, _MOST_GRAPHS = 4096, 256, 4
"""What is captured: a graph keeps the memory that its forward pass takes, all of a model in one pool."""

_FREE = 0.2
"""The share of the GPU's memory that must be free for that."""

_MULTIPLE, _ROUNDED = 64, 1024
"""Lengths are rounded up to a multiple, so that few shapes come, where a batch has up to so many tokens."""

_SIMPLE = (int, float, str, bool, type(None), range)

_OF_OUTPUTS = "transformers.utils.output_capturing"
"""Whose hooks stay on a model that was once asked for its hidden states, and do nothing unless it is asked again."""

_TRIES = 3
"""How often one shape is captured at most: a model may change between any two runs."""


class ShortPasses:
    """The captured forward passes of a model, by shape and probes."""

    _known: ClassVar[WeakKeyDictionary[TransformerBridge, ShortPasses]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._times: Counter[Any] = Counter()
        self._captures: Counter[Any] = Counter()
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    @classmethod
    def of(cls, model: TransformerBridge, probes: Sequence[Probe], rule: BatchRule) -> ShortPasses | None:
        """Return a model's, None where no forward pass of it with these probes can be captured."""
        is_on_gpu = torch.device(model.cfg.device).type == "cuda"
        if not is_on_gpu or rule.remembers or any(map(is_hooked, Sites.of(model).hook_points)):
            return None
        if not all(probe.by_row and type(probe).__module__.startswith("melens.") for probe in probes):
            return None  # what others' read besides their settings is not known
        if model not in cls._known:
            cls._known[model] = cls()
        return cls._known[model]

    def padded_length(self, lengths: Sequence[int], rule: BatchRule, longest: int) -> int:
        """Return to how many tokens to pad rows of these lengths: rounded up where a captured pass could run them."""
        n_pos = max(lengths)
        rounded = min(-(-n_pos // _MULTIPLE) * _MULTIPLE, longest)
        is_short = len(lengths) * rounded <= _ROUNDED
        return rounded if is_short and rule.may_share([*lengths, rounded]) else n_pos

    def replay(self, batch: Batch, recorder: Recorder) -> bool:
        """Run the graph of a batch's shape, if there is one, and record what it gives: see `hold`."""
        graph = self._graphs.get(_key(batch, recorder))
        if graph is None or not graph.state.weights_are_there():
            return False
        with torch.cuda.device(batch.tokens.device):
            graph.run(batch, recorder)
        return True

    def hold(self, model: TransformerBridge, batches: Sequence[Batch], recorder: Recorder) -> bool:
        """Tell whether the graphs that ran on these batches are of the model as it is: asked while the GPU computes."""
        if not batches:
            return True
        state = _State.of(model)
        return all(self._graphs[_key(batch, recorder)].state == state for batch in batches)

    def note(self, model: TransformerBridge, batch: Batch, recorder: Recorder, recording: Recording) -> None:
        """Take note of a plain run of a batch, the last that was recorded; capture the second of its shape."""
        key, device = _key(batch, recorder), batch.tokens.device
        self._times[key] += 1
        is_short = len(batch.lengths) <= _MOST_ROWS and batch.tokens.numel() <= _MOST_TOKENS
        if not is_short or self._times[key] < 2 or self._captures[key] >= _TRIES:
            return
        state = _State.of(model) if _share_free(device) >= _FREE else None
        if state is None or not state.is_on(device):
            return
        self._captures[key] += 1
        self._graphs.pop(key, None)
        again = Recorder(recorder.probes, recorder.expected)
        with torch.cuda.device(device):
            try:
                graph = _Graph.captured(batch, recorder, recording, state, self._pool)
            except Exception:  # what cannot be captured: a wait for the GPU, a kernel of somebody else's
                self._captures[key] = _TRIES
                return
            graph.run(batch, again)
        if not again.last_equals(recorder):
            self._captures[key] = _TRIES
            return
        self._graphs[key] = graph
        while len(self._graphs) > _MOST_GRAPHS:
            self._graphs.popitem(last=False)


@dataclass(frozen=True)
class _Graph:
    """A forward pass with its reductions, which runs on whatever `tokens` and `n_tokens` hold.

    Attributes:
        state: of the model, when it was captured.
        is_real: memory that the graph reads; without such a mask transformers takes prompts for packed ones.
        results: by probe, its targets and what it reduced them to, in memory that the next run writes anew.
    """

    graph: torch.cuda.CUDAGraph
    state: _State
    tokens: Tensor
    n_tokens: Tensor
    is_real: Tensor
    results: dict[str, tuple[list[Target], Reduced]]

    @classmethod
    def captured(cls, batch: Batch, recorder: Recorder, recording: Recording, state: _State, pool: Any) -> _Graph:
        tokens, n_rows = batch.tokens.roll(1, dims=1), len(batch.tokens)  # not the batch's own
        other = Batch(tokens, (1,) * n_rows, tuple(range(n_rows)))  # nor its lengths
        n_tokens = other.n_tokens
        is_real = torch.ones_like(tokens)
        fresh = Recorder(recorder.probes, recorder.expected, sends=False)
        graph = torch.cuda.CUDAGraph()
        with recording(fresh) as network:
            fresh.begin(other)
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                network(input_ids=tokens, attention_mask=is_real, use_cache=False)
                results = fresh.reduced()
        return cls(graph, state, tokens, n_tokens, is_real, results)

    def run(self, batch: Batch, recorder: Recorder) -> None:
        recorder.begin(batch)
        self.tokens.copy_(batch.tokens)
        self.n_tokens.copy_(batch.n_tokens)
        self.graph.replay()
        recorder.take(self.results)
        recorder.end()


def _share_free(device: torch.device) -> float:
    """Return the share of a GPU's memory that is free, or that PyTorch only holds in stock."""
    free, whole = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / whole


def _key(batch: Batch, recorder: Recorder) -> Any:
    return tuple(batch.tokens.shape), tuple(_settings_of(probe) for probe in recorder.probes)


def _settings_of(probe: Probe) -> tuple[Any, ...]:
    """Return what a probe of melens is known by: its class and settings."""
    settings = (
        (name, tuple(value) if isinstance(value, list) else value) for name, value in sorted(vars(probe).items())
    )
    return type(probe), *settings


@dataclass(frozen=True)
class _State:
    """What a graph of a model depends on besides the tokens.

    Attributes:
        twin: which is run.
        modules: its own, which keep their weights' memory while a graph may read it.
        weights: of these modules, with the addresses of their memory.
        settings: other attributes of the modules, and settings of PyTorch.
    """

    twin: Twin
    modules: tuple[nn.Module, ...] = field(compare=False)
    weights: tuple[tuple[int, int], ...]
    settings: tuple[Any, ...]

    @classmethod
    def of(cls, model: TransformerBridge) -> _State | None:
        """Return a model's; None where there are hooks, which a graph would not run."""
        if any(map(is_hooked, Sites.of(model).hook_points)):
            return None
        twin = Twin.of(model)
        modules = tuple(twin.network.modules())
        if twin.why_not or not twin.is_fused or any(map(_has_hooks, modules)):
            return None
        attributes = (value for module in modules for value in vars(module).values())
        known = tuple(value if isinstance(value, _SIMPLE) else id(value) for value in attributes)
        return cls(twin, modules, _weights_of(modules), (known, _settings_of_torch()))

    def weights_are_there(self) -> bool:
        """Tell whether the modules have the same weights in the same memory."""
        return _weights_of(self.modules) == self.weights

    def is_on(self, device: torch.device) -> bool:
        return {weight.device for weight in self.twin.network.parameters()} == {device}


def _has_hooks(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return "forward" in vars(module) or any(getattr(hook, "__module__", "") != _OF_OUTPUTS for hook in hooks)


def _weights_of(modules: Sequence[nn.Module]) -> tuple[tuple[int, int], ...]:
    held = (tensors for module in modules for tensors in (module._parameters, module._buffers) if tensors)
    return tuple((id(each), each.data_ptr()) for tensors in held for each in tensors.values() if each is not None)


def _settings_of_torch() -> tuple[Any, ...]:
    cuda = torch.backends.cuda
    return (
        torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.get_default_dtype(),
        float32_precision(), torch.are_deterministic_algorithms_enabled(),
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
    )  # fmt: skip
