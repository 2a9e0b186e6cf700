"""Where melens keeps what takes long to make, and how it knows that it still holds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from platformdirs import user_cache_path
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["Store", "cache_folder", "code_version", "fingerprint", "store_for"]


def cache_folder() -> Path:
    """Return the user's cache folder for melens; `MELENS_CACHE` moves it."""
    return Path(os.environ.get("MELENS_CACHE") or user_cache_path("melens"))


class Store:
    """Tensors and tables by name in a folder, each file whole or not at all, so that several processes may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor] | None:
        """Read what was saved under a name; None where there is nothing, or nothing that can be read."""
        try:
            return load_file(self.folder / f"{name}.safetensors", device=str(device))
        except Exception:  # missing, or cut short by a full disk: it is made again
            return None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors; a folder that cannot be written to keeps nothing."""
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        self._write(self.folder / f"{name}.safetensors", lambda path: save_file(contiguous, path))

    def load_table(self, name: str) -> pd.DataFrame | None:
        """Read a table that was saved under a name; None as in `load`."""
        try:
            return pd.read_parquet(self.folder / f"{name}.parquet")
        except Exception:
            return None

    def save_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a table, as `save` does tensors."""
        self._write(self.folder / f"{name}.parquet", lambda path: table.to_parquet(path, index=False))

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        partial = self.folder / f".{path.name}.{os.getpid()}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(partial)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)


@torch.no_grad()
def fingerprint(network: nn.Module) -> str:
    """Hash a model's weights, by the exact sum of each one's bits: two models that differ have different hashes."""
    digest = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        bits = weight.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()


def store_for(kind: str, network: nn.Module, *told: object) -> Store:
    """Return where results of a kind are kept for a model and whatever else they depend on.

    Nothing that another version of melens or torch, other weights or another kind of device made is found there.

    Args:
        kind: a folder in the cache.
        network: the transformers model, on its device.
        told: tensors of tokens, numbers, words.
    """
    device = next(network.parameters()).device.type
    digest = hashlib.sha256(f"{code_version()} {torch.__version__} {device} {fingerprint(network)}".encode())
    for part in told:
        digest.update(part.cpu().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return Store(cache_folder() / kind / digest.hexdigest()[:24])


@cache
def code_version(folder: Path = Path(__file__).parent) -> str:
    """Hash a package's source, by default the library's: what another version computed is not taken for this one's."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
