"""Prompts by task type and length, and how they become tokens.

    load_prompts("short", tasks="maths", model=model)       # the texts that fit a model
    tokenized = choose_prompts(model, load_prompts())       # with their tokens

In a causal model token 0 sees only itself: prompts with the same first token have the same states there. So the
project's own prompts all begin with different characters, and no tokenizer gives two of them the same first token,
unless BOS is prepended.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from melens.data.reading import file_rows, lone_surrogate
from melens.data.tasks import OWN_PROMPTS, check_tasks
from melens.environment.conf import conf_folder
from melens.errors import MelensError
from melens.printing import Brief
from melens.validation.signatures import checked, given
from melens.validation.types import Count

__all__ = [
    "Bos", "Prompt", "TokenizedPrompts", "byte_tokenizer", "check_length", "choose_prompts", "load_prompts",
    "random_tokens", "tokenize",
]  # fmt: skip

Bos = Literal["auto", "true", "false"]
_log = logging.getLogger(__name__)
TASKS = ("commonsense", "maths", "logic", "continuation")


@dataclass(frozen=True, repr=False)
class Prompt(Brief):
    """A text with its task type (one of `TASKS`, or the user's own word) and a name.

    A number as task or name becomes text, because a column of a table has one type; NaN, pandas's missing value,
    becomes None.

    Raises:
        MelensError: the text has half of a surrogate pair in it.

    Example:
        >>> melens.Prompt("Once upon a time", task="story", id=7).id
        '7'
    """

    text: str
    task: str | int | float | None = None
    id: str | int | float | None = None

    def __post_init__(self) -> None:
        for field in ("task", "id"):
            value = getattr(self, field)
            object.__setattr__(self, field, None if value is None or value != value else str(value))
        if (half := lone_surrogate([self.text, self.task, self.id])) is not None:
            raise MelensError(
                f"A prompt contains {half}, half of a surrogate pair, which is not a character. Remove it."
            )


@dataclass(frozen=True, repr=False)
class TokenizedPrompts(Brief):
    """Prompts with their token ids.

    Attributes:
        prompts: the texts, with their task and id; empty texts where only token ids are known.
        tokens: the token ids of each, `[pos]`, on the CPU.
    """

    prompts: list[Prompt]
    tokens: list[Int[Tensor, " _"]]


@checked
def load_prompts(
    file: str | Path | None = None,
    tasks: str | Sequence[str | int | float] | None = None,
    *,
    model: Any = None,
    max_tokens: Count | None = None,
    bos: Bos = "auto",
) -> list[Prompt]:
    """Read the project's prompts, 9 of each task type from about 10 to more than 1,000 tokens, or a user's file.

    Args:
        file: `.jsonl`, `.json` or `.csv` with the column `text` and perhaps `task` and `id`, or a text file with a
            prompt in each line (`melens.data.reading`); a name of `conf/prompts`, such as `"short"`, as `prompts=short`
            on the command line; None for the project's own prompts.
        tasks: keep these task types, or this one; None keeps all.
        model: leave out what is too long for it, as the command line does (`choose_prompts`). A trace or a study leaves
            the project's prompts that are longer than the context out by itself.
        max_tokens: leave out prompts of more of the model's tokens.
        bos: as for `tokenize`, which counts.

    Returns:
        `Prompt`s, in the order of the file.

    Raises:
        MelensError: the file is missing, empty or malformed (the line is named), no prompt has such a task or is short
            enough, or tokens are to be counted without a model.

    Example:
        >>> own = melens.load_prompts()
        >>> len(own), sorted({prompt.task for prompt in own})
        (36, ['commonsense', 'continuation', 'logic', 'maths'])
    """
    if preset := _presets().get(str(file), {}):
        file, tasks = preset["file"], preset["tasks"] if tasks is None else tasks
        max_tokens = preset["max_tokens"] if max_tokens is None else max_tokens
        bos = preset["bos"] if bos == "auto" else bos
    if model is None and max_tokens is not None:
        raise MelensError(
            f"load_prompts: which prompts have at most {max_tokens} tokens depends on the model: give model=model."
        )
    prompts = _read(file)
    if tasks is not None:
        wanted = [tasks] if isinstance(tasks, str) else [str(task) for task in tasks]
        check_tasks(wanted, (None if prompt.task is None else str(prompt.task) for prompt in prompts))
        prompts = [prompt for prompt in prompts if prompt.task in wanted]
    if model is None:
        return prompts
    if not hasattr(model, "tokenizer"):
        raise MelensError(f"load_prompts: model is {given(model)}; it must be what melens.load_model(name) returns.")
    if model.tokenizer is None:
        raise MelensError("load_prompts: this model has no tokenizer to count tokens with. Leave model out.")
    return choose_prompts(model, prompts, bos=bos, max_tokens=max_tokens).prompts


def _read(file: str | Path | None) -> list[Prompt]:
    path = OWN_PROMPTS if file is None else Path(os.path.expanduser(file))
    if not path.suffix and not path.exists():
        raise MelensError(f"There is no file {path}, and no prompts of that name; known are {', '.join(_presets())}.")
    prompts = []
    for row in file_rows(path):
        text = row.text()
        if not text.strip():
            raise MelensError(f"{row.place}: the text is empty; a prompt needs at least one word.")
        prompts.append(Prompt(text, row.word("task"), row.word("id") or row.at))
    return prompts


@cache
def _presets() -> dict[str, dict[str, Any]]:
    files = sorted(conf_folder("prompts").glob("*.yaml"))
    return {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in files}


@cache
def _own_prompts() -> frozenset[Prompt]:
    return frozenset(load_prompts())


def tokenize(model: Any, prompts: Sequence[Prompt], *, bos: Bos = "auto") -> list[list[int]]:
    """Turn prompts into token ids.

    Args:
        model: a bridge with a tokenizer attached.
        prompts: the texts.
        bos: `"auto"` prepends BOS if the model's own tokenizer does, `"true"` always, `"false"` never.
            (TransformerLens by default always prepends one, which gives Qwen and SmolLM2 a token 0 they never saw.)

    Raises:
        MelensError: the model has no tokenizer or no BOS token, or a prompt has fewer than two tokens or more than the
            context.
    """
    tokens = _token_ids(model, prompts, bos)
    for number, (prompt, ids) in enumerate(zip(prompts, tokens, strict=True)):
        check_length(len(ids), str(prompt.id or f"number {number}"), model.cfg.n_ctx)
    return tokens


def _token_ids(model: Any, prompts: Sequence[Prompt], bos: Bos) -> list[list[int]]:
    if bos not in get_args(Bos):
        raise MelensError(f"prompts.bos is {bos!r}; allowed are {', '.join(get_args(Bos))}.")
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise MelensError("This model has no tokenizer. Give the prompts as token ids.")
    bos_id = tokenizer.bos_token_id
    if bos == "true" and bos_id is None:
        raise MelensError("prompts.bos is 'true', but this model's tokenizer has no BOS token.")
    before = [bos_id] if bos == "true" else []
    return [
        [*before, *tokenizer(prompt.text, add_special_tokens=bos == "auto", verbose=False)["input_ids"]]
        for prompt in prompts
    ]


def choose_prompts(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    bos: Bos = "auto",
    max_tokens: int | None = None,
    seed: int = 0,
) -> TokenizedPrompts:
    """Turn prompts into tokens, and keep those that are short enough.

    Args:
        model: a bridge; without a tokenizer random tokens take the place of the project's prompts.
        prompts: the texts. Of the project's own, those longer than the context are left out, which is logged; a user's
            are left out by `max_tokens` only.
        bos: as for `tokenize`.
        max_tokens: leave longer prompts out; None keeps all.
        seed: of random tokens.

    Raises:
        MelensError: no prompt is short enough, a user's prompt is longer than the context, or the model lacks a
            tokenizer or a BOS token that is needed.
    """
    n_ctx, n_vocabulary = model.cfg.n_ctx, model.cfg.d_vocab
    if model.tokenizer is None:
        if not _own_prompts().issuperset(prompts):
            raise MelensError(
                "This model has no tokenizer. Give token ids, or leave prompts.file out to use random tokens."
            )
        n_prompts = min(len(prompts), n_vocabulary)
        n_tokens = min(128, n_ctx, n_ctx if max_tokens is None else max_tokens)
        _log.warning("This model has no tokenizer: %d prompts of random tokens replace the texts.", n_prompts)
        drawn = random_tokens(n_prompts, n_tokens, n_vocabulary, seed=seed)
        return TokenizedPrompts([Prompt(text="") for _ in drawn], drawn)
    tokens = _token_ids(model, prompts, bos)
    lengths = [len(ids) for ids in tokens]
    wanted = [row for row, length in enumerate(lengths) if max_tokens is None or length <= max_tokens]
    if not wanted:
        raise MelensError(f"prompts.max_tokens is {max_tokens}, but the shortest prompt has {min(lengths)} tokens.")
    too_long = [row for row in wanted if lengths[row] > n_ctx]
    problem = f"{len(too_long)} of {len(wanted)} prompts are longer than the model's context of {n_ctx:,} tokens"
    if len(too_long) == len(wanted):
        raise MelensError(f"{problem}; the shortest has {min(lengths):,}.")
    if others := [row for row in too_long if prompts[row] not in _own_prompts()]:
        first = prompts[others[0]].id or f"number {others[0]}"
        raise MelensError(
            f"{problem}; the first is {first}. Leave them out: prompts.max_tokens={n_ctx}, or in Python "
            f"load_prompts(file, model=model, max_tokens={n_ctx})."
        )
    if too_long:
        _log.warning("%s and are left out.", problem)
    chosen = [row for row in wanted if lengths[row] <= n_ctx]
    for row in chosen:
        check_length(lengths[row], str(prompts[row].id or f"number {row}"), n_ctx)
    return TokenizedPrompts([prompts[row] for row in chosen], [torch.tensor(tokens[row]) for row in chosen])


_CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with a token for each byte and a chat template, for models with random weights."""
    bytes_as_letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(bytes_as_letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=10**6
    )
    wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    wrapped.chat_template = _CHAT_TEMPLATE
    return wrapped


def check_length(n_tokens: int, name: str, n_ctx: int) -> None:
    """Raise a `MelensError` for a prompt of fewer than two tokens or more than the context."""
    if n_tokens < 2:
        raise MelensError(f"Prompt {name} has {n_tokens} token(s); a prompt needs at least 2.")
    if n_tokens > n_ctx:
        raise MelensError(f"Prompt {name} has {n_tokens:,} tokens, more than the model's context of {n_ctx:,}.")


def random_tokens(n_prompts: int, n_tokens: int, vocabulary: int, *, seed: int = 0) -> list[Int[Tensor, " pos"]]:
    """Draw prompts of random token ids with distinct first tokens, for models that have no tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    firsts = torch.randperm(vocabulary, generator=generator)[:n_prompts]
    rest = torch.randint(vocabulary, (n_prompts, n_tokens - 1), generator=generator)
    return list(torch.cat([firsts[:, None], rest], dim=1))
