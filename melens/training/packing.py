"""The text of a pre-training: documents, joined and cut into rows of one length, and the tokenizer that cuts words.

    text = packed_text("docs/", tokenizer, length=512, held_out=0.01)
    text.training[0]["input_ids"], len(text.validation)

Each document ends with EOS, and the next one follows in the same row (GPT-3, appendix B): attention crosses from one to
the other, and a row begins anywhere in a document. What is held out are whole documents, the same for every training on
this text with this tokenizer. Rows and tokenizers are kept in the user's cache, under what they were made of.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_from_disk
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from melens.data.reading import Row, file_rows, has_columns
from melens.data.texts import hub_dataset, read_text
from melens.errors import MelensError
from melens.printing import Brief
from melens.storage.cache import cache_folder, hash_of, tokenizer_fingerprint
from melens.storage.files import atomic_folder
from melens.training.datasets import PYTHON_DOCS

__all__ = ["PackedText", "TextSource", "packed_text", "tokenizer_of_text"]

_END = "<|endoftext|>"
_HELD_OUT_OF = 2**32


@dataclass(frozen=True)
class TextSource:
    """Where documents come from: `python_docs`, a file, a folder of files, or a dataset of the hub.

    Attributes:
        name: of the source; a plain file is one document, a file with columns and a dataset have one a row.
        split, column: of a dataset, or of a file with columns.
    """

    name: str
    split: str = "train"
    column: str = "text"

    def documents(self) -> Iterator[str]:
        """Yield the documents, those of a folder in the order of their paths.

        Raises:
            MelensError: there is nothing to read, or a row has no text in that column.
        """
        place = Path(os.path.expanduser(self.name))
        if self.name == PYTHON_DOCS:
            yield from read_text().split("\n\n\n")
        elif place.is_dir():
            files = [file for file in sorted(place.rglob("*")) if file.is_file() and not file.name.startswith(".")]
            if not files:
                raise MelensError(f"There is no file in {place}, the folder of training.dataset.")
            yield from chain.from_iterable(map(self._of_file, files))
        elif place.is_file():
            yield from self._of_file(place)
        else:
            rows = hub_dataset(self.name, self.split, "give a file or a folder")
            if self.column not in rows.column_names:
                raise MelensError(f"The dataset {self.name} has no column {self.column!r}: it has {rows.column_names}.")
            yield from (row[self.column] for row in rows)

    def _of_file(self, file: Path) -> Iterator[str]:
        if not has_columns(file):
            yield file.read_text("utf-8", errors="replace")
            return
        for row in file_rows(file):
            yield self._text_of(row)

    def _text_of(self, row: Row) -> str:
        text = row.fields.get(self.column)
        if not isinstance(text, str):
            raise MelensError(f"{row.place}: there is no text in column {self.column!r}. Set training.columns.text.")
        return text

    def fingerprint(self) -> str:
        """Hash the documents in order, byte for byte; the ids of a dataset's revision would not do for a file."""
        digest = hashlib.sha256()
        for document in self.documents():
            own = document.encode("utf-8", errors="replace")
            digest.update(len(own).to_bytes(8, "little") + own)
        return digest.hexdigest()


@dataclass(frozen=True, repr=False)
class PackedText(Brief):
    """Rows of one length, with the column `input_ids`.

    Attributes:
        training, validation: rows of other documents.
    """

    training: Dataset
    validation: Dataset


def packed_text(
    source: TextSource, tokenizer: Any, *, length: int, held_out: float, validation: TextSource | None = None
) -> PackedText:
    """Tokenize documents and cut them into rows; what is left over at the end is less than a row and dropped.

    Args:
        source: of the documents.
        tokenizer: with an EOS token.
        length: of a row, in tokens.
        held_out: share of the documents that are held out, drawn by the hash of each; at least one.
        validation: documents of their own for the rows that are held out; `held_out` does not count then.

    Raises:
        MelensError: a tokenizer without EOS, or too little text for a row of each.
    """
    if tokenizer.eos_token_id is None:
        raise MelensError("This tokenizer has no EOS token to put between documents. Choose another model.tokenizer.")
    share = held_out if validation is None else validation.fingerprint()
    key = hash_of("packed", source.fingerprint(), tokenizer_fingerprint(tokenizer), length, share)[:24]
    folder = _place(key)
    with FileLock(f"{folder}.lock"):  # the runs of a sweep that begin together take turns
        if not folder.is_dir():
            rows = _pack(source, validation, tokenizer, length, held_out)
            with atomic_folder(folder, replace=True) as partial:
                for name, of_part in rows.items():
                    of_part.save_to_disk(partial / name)
    return PackedText(**{name: load_from_disk(folder / name) for name in ("training", "validation")})


def _place(key: str) -> Path:
    folder = cache_folder() / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / key


def _pack(
    source: TextSource, validation: TextSource | None, tokenizer: Any, length: int, held_out: float
) -> dict[str, Dataset]:
    tokens: dict[str, list[np.ndarray]] = {"training": [], "validation": []}
    for text, ids in _tokenized(source, tokenizer):
        tokens["validation" if validation is None and _is_held_out(text, held_out) else "training"].append(ids)
    if validation is not None:
        tokens["validation"] = [ids for _, ids in _tokenized(validation, tokenizer)]
    elif not tokens["validation"] and len(tokens["training"]) > 1:  # of few documents perhaps none is drawn
        tokens["validation"].append(tokens["training"].pop())
    packed = {}
    for name, parts in tokens.items():
        joined = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        if len(joined) < length:
            raise MelensError(
                f"The text has {len(joined):,} tokens for {name}, less than a row of {length:,} (training.max_length). "
                "Give more documents, or shorter rows."
            )
        rows = joined[: len(joined) // length * length].reshape(-1, length)
        packed[name] = Dataset.from_dict({"input_ids": rows})
    return packed


def _tokenized(source: TextSource, tokenizer: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield documents with their tokens and EOS, those that are blank left out."""
    documents = (text for text in source.documents() if text.strip())
    while batch := list(islice(documents, 256)):
        ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        for text, of_text in zip(batch, ids, strict=True):
            yield text, np.array([*of_text, tokenizer.eos_token_id], dtype=np.int32)


def _is_held_out(document: str, share: float) -> bool:
    """Draw a document by its own words, so that others beside it do not change what is held out."""
    drawn = hashlib.sha256(document.encode("utf-8", errors="replace")).digest()[:4]
    return int.from_bytes(drawn, "little") < share * _HELD_OUT_OF


def tokenizer_of_text(source: TextSource, vocab_size: int) -> Path:
    """Train a byte-level BPE on documents (Sennrich et al. 2016, Radford et al. 2019), and return its folder.

    Args:
        source: of the documents.
        vocab_size: of the model, `<|endoftext|>` and the 256 bytes included.

    Raises:
        MelensError: a vocabulary too small for the bytes.
    """
    if vocab_size < 257:
        raise MelensError(f"A vocabulary of {vocab_size} does not hold the 256 bytes and EOS: set 257 or more.")
    folder = _place(f"bpe-{hash_of(source.fingerprint(), vocab_size)[:24]}")
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _train_tokenizer(source, vocab_size, folder)
    return folder


def _train_tokenizer(source: TextSource, vocab_size: int, folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(source.documents(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)
    with atomic_folder(folder, replace=True) as partial:
        fast.save_pretrained(partial)
