"""Prompts by task type and length, and the rules by which they become tokens.

In a causal model token 0 sees only itself: prompts that share their first token share its every state. The project's
own prompts therefore all begin with a different character, so that no tokenizer gives two of them the same first
token, unless BOS is prepended.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from melens.errors import MelensError

__all__ = ["Bos", "Prompt", "byte_tokenizer", "check_length", "load_prompts", "random_tokens", "tokenize"]

Bos = Literal["auto", "true", "false"]
TASKS = ("commonsense", "maths", "logic", "continuation")


@dataclass(frozen=True)
class Prompt:
    """A text with its task type (one of `TASKS`, or the user's own word) and a name."""

    text: str
    task: str | None = None
    id: str | None = None


def load_prompts(file: str | Path | None = None, tasks: Sequence[str] | None = None) -> list[Prompt]:
    """Read the project's prompts, 9 of each task type from about 10 to more than 1,000 tokens, or a user's file.

    Args:
        file: a `.jsonl` file with `{"text": ..., "task": ..., "id": ...}` a line (`text` alone is needed), or any other
            text file with one prompt a line; None for the project's own prompts.
        tasks: keep these task types; None keeps all.

    Raises:
        MelensError: a file that is missing, empty or malformed (the line is named), or a task that no prompt has.
    """
    if file is None:
        prompts = _parse_jsonl(resources.files("melens").joinpath("prompts.jsonl").read_text("utf-8"), "prompts.jsonl")
    else:
        prompts = _read_file(Path(file).expanduser())
    if tasks is not None:
        known = sorted({prompt.task for prompt in prompts if prompt.task is not None})
        unknown = [task for task in tasks if task not in known]
        if unknown:
            raise MelensError(
                f"No prompt has the task {unknown[0]!r}; the tasks are {', '.join(known) or 'not given'}."
            )
        prompts = [prompt for prompt in prompts if prompt.task in tasks]
    return prompts


def _read_file(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise MelensError(f"There is no prompt file {path}.")
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MelensError(f"The prompt file {path} cannot be read as UTF-8 text ({error}).") from error
    if path.suffix == ".jsonl":
        prompts = _parse_jsonl(content, str(path))
    else:
        prompts = [
            Prompt(line, id=f"line {number}") for number, line in enumerate(content.splitlines(), 1) if line.strip()
        ]
    if not prompts:
        raise MelensError(f"The prompt file {path} is empty: it needs at least one prompt.")
    return prompts


def _parse_jsonl(content: str, name: str) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["text"]
            if not isinstance(text, str) or not text.strip():
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise MelensError(f'{name}, line {number}: expected {{"text": "...", "task": "..."}} in JSON.') from None
        prompts.append(Prompt(text, task=row.get("task"), id=str(row.get("id", f"line {number}"))))
    return prompts


def tokenize(model: Any, prompts: Sequence[Prompt], *, bos: Bos = "auto") -> list[list[int]]:
    """Turn prompts into token ids.

    Args:
        model: a bridge with a tokenizer attached.
        prompts: the texts.
        bos: `"auto"` prepends BOS if the model's own tokenizer does, `"true"` always, `"false"` never.
            (TransformerLens by itself always prepends one, which gives Qwen and SmolLM2 a token 0 they never saw.)

    Raises:
        MelensError: no tokenizer, no BOS token, a prompt of fewer than two tokens or longer than the context.
    """
    if bos not in get_args(Bos):
        raise MelensError(f"prompts.bos is {bos!r}; allowed are {', '.join(get_args(Bos))}.")
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise MelensError("This model has no tokenizer: give the prompts as token ids.")
    bos_id = tokenizer.bos_token_id
    if bos == "true" and bos_id is None:
        raise MelensError("prompts.bos is 'true', but this model's tokenizer has no BOS token.")
    tokens = []
    for number, prompt in enumerate(prompts):
        ids = list(tokenizer(prompt.text, add_special_tokens=bos == "auto")["input_ids"])
        if bos == "true":
            ids = [bos_id, *ids]
        name = prompt.id or f"number {number}"
        check_length(len(ids), name, model.cfg.n_ctx)
        tokens.append(ids)
    return tokens


_CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with a token a byte and a chat template, for models with random weights."""
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
        raise MelensError(f"Prompt {name} has {n_tokens} token(s); at least 2 are needed.")
    if n_tokens > n_ctx:
        raise MelensError(f"Prompt {name} has {n_tokens:,} tokens, more than the model's context of {n_ctx:,}.")


def random_tokens(n_prompts: int, n_tokens: int, vocabulary: int, *, seed: int = 0) -> list[Int[Tensor, " pos"]]:
    """Draw prompts of random token ids with distinct first tokens, for models that have no tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    firsts = torch.randperm(vocabulary, generator=generator)[:n_prompts]
    rest = torch.randint(vocabulary, (n_prompts, n_tokens - 1), generator=generator)
    return list(torch.cat([firsts[:, None], rest], dim=1))
