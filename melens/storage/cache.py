"""The cache: what takes long to compute is kept under a key of everything that decides it.

    store = store_for("masks", network, tokens, options)     # a folder, named by the key
    scores = store.load_table("scores")                      # None where nothing was kept: compute, then save_table

The key is made of

1. the model (`fingerprint`): the bytes of every weight and buffer in their order, its modules, config and generation
   config, and what was hooked or patched onto it;
2. where and by what it was computed: melens's own source, the versions of the libraries, the kind of device;
3. what the caller gives (`hash_of`): tokens, masks, options, the tokenizer (`tokenizer_fingerprint`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from datetime import date
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from accelerate.utils import align_module_device
from jaxtyping import Int
from platformdirs import user_cache_path
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from melens.errors import MelensError
from melens.models.quantization import is_quantized
from melens.storage.files import atomic_file

__all__ = [
    "RUN_CACHE", "RunCache", "Store", "cache_folder", "code_version", "fingerprint", "float32_precision", "hash_of",
    "library_versions",
    "store_for", "store_for_kind", "tokenizer_fingerprint", "warn_if_not_cached",
]  # fmt: skip


def cache_folder() -> Path:
    """Return the user's cache folder for melens; `MELENS_CACHE` moves it."""
    return Path(os.environ.get("MELENS_CACHE") or user_cache_path("melens"))


@dataclass(frozen=True)
class Store:
    """Tensors, tables and texts by name in a folder, each file whole or not at all: several processes may share it.

    A `load` gives None where there is nothing, or nothing that can be read; a `save` into a folder that cannot be
    written to logs a warning, once.
    """

    folder: Path

    def load(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor] | None:
        with suppress(Exception):  # missing, or cut short by a full disk: it is made again
            return load_file(self.folder / f"{name}.safetensors", device=str(device))
        return None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        self._write(f"{name}.safetensors", lambda path: save_file(contiguous, path))

    def load_table(self, name: str) -> pd.DataFrame | None:
        with suppress(Exception):
            return pd.read_parquet(self.folder / f"{name}.parquet")
        return None

    def save_table(self, name: str, table: pd.DataFrame) -> None:
        self._write(f"{name}.parquet", lambda path: table.to_parquet(path, index=False))

    def load_text(self, name: str) -> str | None:
        with suppress(OSError, UnicodeDecodeError):
            return (self.folder / f"{name}.json").read_text("utf-8")
        return None

    def save_text(self, name: str, text: str) -> None:
        self._write(f"{name}.json", lambda path: path.write_text(text, "utf-8"))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        with warn_if_not_cached():
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.folder / name) as partial:
                write(partial)


@dataclass
class RunCache:
    """What a run found in the cache, and whether the next process finds what this one measures.

    Attributes:
        found_trace: the trace was there.
        has_trace: the trace, which is kept first, is in the cache.
        is_incomplete: something could not be written, or belongs to a model that only this process can name.
    """

    found_trace: bool = False
    has_trace: bool = False
    is_incomplete: bool = False

    @property
    def can_resume(self) -> bool:
        return self.has_trace and not self.is_incomplete

    def reset(self) -> None:
        self.found_trace = self.has_trace = self.is_incomplete = False


RUN_CACHE = RunCache()  # of the run that this process is in


@contextmanager
def warn_if_not_cached() -> Iterator[None]:
    """Write to the cache; where that fails, as in a read-only folder or on a full disk, warn once and go on."""
    try:
        yield
    except OSError as error:
        RUN_CACHE.is_incomplete = True
        _warn_not_cached(cache_folder(), error.strerror or str(error))


@cache
def _warn_not_cached(folder: Path, why: str) -> None:
    sentence = "so the next run computes everything again. Set MELENS_CACHE to another folder."
    logging.getLogger(__name__).warning("Cannot write to the cache %s (%s), %s", folder, why, sentence)


def store_for(kind: str, network: nn.Module, *parts: object, libraries: tuple[str, ...] = ()) -> Store:
    """Return where results of a kind are kept for a transformers model and whatever else they depend on.

    Nothing that another version of melens or of a library, another model or another kind of device made is found there.

    Args:
        parts: whatever else decides it, as `hash_of` takes it.
        libraries: whose inside decides the result too, besides torch, transformers and TransformerLens.

    Raises:
        MelensError: as `fingerprint`.
    """
    return Store(cache_folder() / kind / hash_of(_made_by(network, *libraries), fingerprint(network), parts)[:24])


def store_for_kind(kind: str, network: nn.Module, *parts: object) -> Store:
    """As `store_for`, of results that all models of one class, config and precision share, whatever their weights."""
    dtypes = sorted({str(weight.dtype) for weight in network.parameters()})
    own = [type(network).__qualname__, dtypes, *_configs(network)]
    return Store(cache_folder() / kind / hash_of(_made_by(network), own, parts)[:24])


_LIBRARIES = ("torch", "transformers", "transformer_lens", "tokenizers", "accelerate", "numpy", "pandas")


def library_versions(*libraries: str) -> dict[str, str]:
    """Return the versions of the libraries whose inside decides a result, and of others that are named."""
    versions = dict.fromkeys([*_LIBRARIES, *libraries], "none")
    for library in versions:
        with suppress(metadata.PackageNotFoundError):  # of an extra that is not there
            versions[library] = metadata.version(library)
    return versions


def _made_by(network: nn.Module, *libraries: str) -> list[object]:
    versions = library_versions(*libraries)
    devices = sorted({weight.device.type for weight in network.parameters()})
    return [code_version(), versions, devices, float32_precision()]


def float32_precision() -> tuple[str, ...]:
    """Return how float32 matrices are multiplied: as TF32, say, on a GPU and on a CPU.

    `torch.get_float32_matmul_precision` raises where a library, as transformers' Trainer, has set them one by one.
    """
    backends: Any = torch.backends
    return backends.fp32_precision, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision


@cache
def code_version(folder: Path = Path(__file__).parents[1]) -> str:
    """Hash a package's source, by default the library's: what another version computed is not taken for this one's."""
    return hash_of({str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.py"))})


# --- Hashes of values -------------------------------------------------------------------------------------------------


def hash_of(*parts: object) -> str:
    """Hash values so that two calls agree only where every value, type, shape and nesting does.

    Args:
        parts: tensors, numbers, text, bytes, paths, None, and lists, dicts, pydantic models and dataclasses of these
            (without the fields that begin with `_`).

    Raises:
        TypeError: a value of another type, whose `repr` may leave out some of what it holds.
    """
    digest = hashlib.sha256()
    _update(digest, parts)
    return digest.hexdigest()


def _update(digest: Any, part: Any) -> None:
    """Add a value with its type and length before it, so that no two sequences of values give the same bytes."""
    if isinstance(part, Tensor):
        own = part.detach().cpu().contiguous()
        _update(digest, [str(own.dtype), list(own.shape), own.view(-1).view(torch.uint8).numpy().tobytes()])
    elif isinstance(part, bytes):
        digest.update(f"bytes {len(part)} ".encode() + part)
    elif isinstance(part, Mapping):
        _update(digest, ["dict", *sorted(part.items(), key=lambda item: repr(item[0]))])
    elif isinstance(part, list | tuple) and part and all(type(each) is int for each in part):
        text = repr(list(part)).encode()  # at once: texts have a million token ids
        digest.update(f"integers {len(text)} ".encode() + text)
    elif isinstance(part, list | tuple):
        digest.update(f"list {len(part)} ".encode())
        for each in part:
            _update(digest, each)
    elif is_dataclass(part) and not isinstance(part, type):
        own_fields = {field.name: getattr(part, field.name) for field in fields(part) if field.name[0] != "_"}
        _update(digest, [type(part).__qualname__, own_fields])
    elif isinstance(part, BaseModel):
        _update(digest, [type(part).__qualname__, part.model_dump()])
    elif part is None or isinstance(part, str | bool | int | float | Path):
        text = repr(part).encode()  # of a float all digits; of a text its quotes, so that 1 is not "1"
        digest.update(f"value {len(text)} ".encode() + text)
    else:
        raise TypeError(f"A key cannot hold {type(part).__name__}: give what it holds.")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash all by which a tokenizer makes tokens of a text or a chat: vocabulary, merges, special tokens, template."""
    if tokenizer is None:
        return hash_of(None)
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = tokenizer.get_vocab() if fast is None else json.loads(fast.to_str())
    if fast is not None:  # what the last call asked for
        rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    names = ("bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token", "chat_template")
    own = {name: str(getattr(tokenizer, name, None)) for name in names}
    if "strftime_now" in own["chat_template"]:  # as Llama-3's, which writes the date into every chat
        own["today"] = date.today().isoformat()
    return hash_of(type(tokenizer).__qualname__, own, json.dumps(rules, sort_keys=True))


# --- Which model ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fingerprint(network: nn.Module) -> str:
    """Hash all of a model that decides what it computes, the same on every device.

    Weights are hashed where they are: only a sum a block of 128 KiB leaves a GPU. Offloaded ones are fetched one after
    the other. A quantised model gets a random name instead, so that nothing is kept of it beyond the process: its
    scales may be in no weight nor buffer.

    Raises:
        MelensError: a weight on the meta device that accelerate would not fetch.
    """
    if is_quantized(network):
        RUN_CACHE.is_incomplete = True
        return hash_of(_NAMES.setdefault(network, uuid4().hex))
    weights = []
    here = {id(weight): weight for weight in network.parameters() if not weight.is_meta}
    sums: dict[int, Tensor] = {}  # of these alone: to hold those that are fetched would fill the memory
    for name, weight in _weights(network):
        of_blocks = sums[id(weight)] if id(weight) in sums else _block_sums(weight)
        if id(weight) in here:  # tied ones are read once
            sums[id(weight)] = of_blocks
        weights.append([name, str(weight.dtype), list(weight.shape), of_blocks])
    return hash_of(weights, str(network), network.training, *_configs(network), list(_attached(network)))


_NAMES: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # of quantised models


def _weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Go through all parameters and buffers, also those that no checkpoint holds: RoPE reads its frequencies there."""
    for path, module in network.named_modules():
        with align_module_device(module):
            for name, weight in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if weight.is_meta:
                    raise MelensError(
                        f"The weight {path}.{name} is on the meta device, so results of this model cannot be cached. "
                        "Set exp.keep=false, or load the model with device_map."
                    )
                yield f"{path}.{name}", weight


_BLOCK = 2**15  # words of 32 bits


def _block_sums(weight: Tensor) -> Int[Tensor, " block"]:
    """Hash each block of a tensor's bytes to Σ word · key mod 2⁶⁴, every place with a random key of its own.

    Multilinear hashing (Lemire & Kaser 2014, "Strongly universal string hashing is fast"). With words of 32 bits and
    keys of 64, whatever changes in a block, or changes places in it, changes its sum but for one choice of keys in
    2³³. (With words of 64 bits it would not: two sign bits that flip would add 2⁶³ each, whatever the keys.)
    """
    raw = weight.detach().contiguous().view(-1).view(torch.uint8)
    if len(raw) % 4 or raw.storage_offset() % 4:
        raw = nn.functional.pad(raw, (0, -len(raw) % 4))  # a copy, which begins at a whole word
    words, keys = raw.view(torch.int32), _keys(weight.device)
    whole = len(words) // _BLOCK * _BLOCK
    step = torch.get_num_threads() if weight.device.type == "cpu" else 128  # on a CPU the products stay in its caches
    sums = [(blocks * keys).sum(-1) for blocks in words[:whole].view(-1, _BLOCK).split(step)]
    rest = words[whole:]
    return torch.cat([*sums, (rest * keys[: len(rest)]).sum(-1, keepdim=True)])


@cache
def _keys(device: torch.device) -> Int[Tensor, " word"]:
    random = hashlib.shake_256(b"melens").digest(8 * _BLOCK)  # the same with every version of every library
    return torch.frombuffer(bytearray(random), dtype=torch.int64).to(device)


def _configs(network: Any) -> Iterator[str | None]:
    """Write a model's config and generation config out, without where the model lies and who wrote the file."""
    for name in ("config", "generation_config"):
        config: Any = getattr(network, name, None)
        values = config.to_dict() if hasattr(config, "to_dict") else config
        yield json.dumps(_without_origin(values), default=str)
    yield getattr(getattr(network, "config", None), "_attn_implementation", None)


def _without_origin(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    origin = ("_name_or_path", "transformers_version")
    return {key: _without_origin(value) for key, value in config.items() if key not in origin}


def _attached(network: nn.Module) -> Iterator[list[str]]:
    """Name what was hooked onto a model, and each `forward` put in place of a module's own.

    What a user's function does cannot be read from it, so it goes by its address, which only this process knows.
    """
    for path, module in network.named_modules():
        functions = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if "_hf_hook" not in vars(module):  # accelerate's own forward brings weights, and changes no number
            functions += [function for name, function in vars(module).items() if name == "forward"]
        for function in functions:
            if not str(getattr(function, "__module__", None)).startswith(_PART_OF_MODEL):
                yield [path, f"{function!r} at {id(function)} of process {os.getpid()}"]


_PART_OF_MODEL = ("transformers.", "transformer_lens.model_bridge.", "melens.models.gates", "melens.models.kv_cache")
"""Where functions come from that a model has for good, some since its first forward pass: code and weights decide them.
(What a user hooks to a bridge comes from `transformer_lens.hook_points`.)"""
