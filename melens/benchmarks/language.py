"""Benchmarks that need no data: loss on a text, induction, copying, and a needle in a long context.

`language_data` tokenises the text, `make_questions` builds contexts and continuations, the same for every mask, and
`score_questions` scores a model on them. Every context begins with BOS if the prompts do: masks and attention sinks act
on token 0, so it must be the same token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from melens.benchmarks.catalog import Benchmark
from melens.benchmarks.scoring import Request, Scorer
from melens.data.prompts import Bos
from melens.data.texts import bos_prefix, cut_texts
from melens.errors import MelensError
from melens.printing import Brief

__all__ = ["LanguageData", "Needle", "Questions", "language_data", "make_questions", "score_questions"]

N_SEQUENCES = 32
"""Items of induction, of copying, and of all the needle's places together, where no limit is given."""

HALF = 64
"""Length of the sequence that induction and copying repeat, in tokens."""

_CITIES = (
    "Oslo", "Lima", "Cairo", "Delhi", "Paris", "Kyiv", "Quito", "Tokyo", "Dublin", "Athens", "Lisbon", "Madrid",
)  # fmt: skip


@dataclass(frozen=True)
class Needle:
    """Where a fact is hidden.

    Attributes:
        lengths: tokens of the context, BOS included.
        depths: the fact's place in it, from 0 (the beginning) to 1 (the end).
    """

    lengths: Sequence[int] = (256, 512)
    depths: Sequence[float | int] = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, repr=False)
class LanguageData(Brief):
    """What questions are made of.

    Attributes:
        texts: token ids for perplexity and copying, each beginning with `bos`.
        long_text: token ids without `bos`, to hide a needle in.
        bos: token ids that every context begins with (`melens.data.texts.bos_prefix`).
        seed: of random tokens and numbers.
        needle: where facts are hidden.
    """

    texts: Int[Tensor, "text pos"]
    long_text: Sequence[int] = ()
    bos: Sequence[int] = ()
    seed: int = 0
    needle: Needle = field(default_factory=Needle)


@dataclass(frozen=True, repr=False)
class Questions(Brief):
    """The questions of a benchmark, the same for every mask: contexts and continuations, and a name for each."""

    benchmark: Benchmark
    requests: list[Request]
    items: list[str]


def language_data(
    model: Any,
    text: str,
    *,
    n_texts: int = 64,
    n_tokens: int = 256,
    bos: Bos = "auto",
    seed: int = 0,
    needle: Needle | None = None,
) -> LanguageData:
    """Tokenise a text, and cut pieces of one length out of it.

    Args:
        model: a bridge; without a tokenizer the pieces are random tokens.
        text: a long one, such as `melens.data.texts.read_text()` returns.
        n_texts, n_tokens, bos, seed: as for `cut_texts`.
        needle: where facts are hidden, if they are.

    Raises:
        MelensError: as `cut_texts`; a needle that needs a longer text, a longer context, or a tokenizer.
    """
    tokenizer = model.tokenizer
    ids = [] if tokenizer is None else tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if needle is not None:
        _check_needle(needle, tokenizer, len(ids))
        if (longest := max(needle.lengths)) > model.cfg.n_ctx:
            raise MelensError(
                f"benchmark.needle.lengths has {longest:,}; lower it to the model's context of {model.cfg.n_ctx:,}."
            )
    texts = cut_texts(model, ids, n_texts=n_texts, n_tokens=n_tokens, bos=bos, seed=seed)
    return LanguageData(texts, ids, bos_prefix(tokenizer, bos), seed, needle or Needle())


def make_questions(
    benchmark: Benchmark, tokenizer: Any, data: LanguageData, *, vocabulary: int, limit: int | None = None
) -> Questions:
    """Make a benchmark's questions.

    Args:
        benchmark: perplexity, induction, copy or needle.
        tokenizer: of the model; only the needle needs one.
        data: texts and where a needle is hidden.
        vocabulary: size of the model's, for random tokens.
        limit: of items.

    Raises:
        MelensError: the needle needs a tokenizer that the model lacks, or a longer text.
    """
    n = N_SEQUENCES if limit is None else min(limit, N_SEQUENCES)
    if benchmark.name == "needle":
        return _needles(benchmark, tokenizer, data, n if limit else None)
    bos = data.bos
    if benchmark.name == "induction":
        drawn = torch.tensor([token for token in range(vocabulary) if token not in bos])
        generator = torch.Generator().manual_seed(data.seed)
        random = drawn[torch.randint(len(drawn), (n, HALF), generator=generator)].tolist()
        requests: list[Request] = [([*bos, *row], row) for row in random]  # BOS begins the context and is not repeated
    elif benchmark.name == "copy":
        requests = [([*bos, *row], row) for row in data.texts[:limit, len(bos) : len(bos) + HALF].tolist()]
    else:
        n_given = max(1, len(bos))
        requests = [(row[:n_given], row[n_given:]) for row in data.texts[:limit].tolist()]
    return Questions(benchmark, requests, [str(at) for at in range(len(requests))])


def _needles(benchmark: Benchmark, tokenizer: Any, data: LanguageData, limit: int | None) -> Questions:
    needle, long_text, bos = data.needle, data.long_text, data.bos
    _check_needle(needle, tokenizer, len(long_text))
    generator = torch.Generator().manual_seed(data.seed)
    places = [(length, depth) for length in needle.lengths for depth in needle.depths]
    per_place = max(1, N_SEQUENCES // len(places))
    requests: list[Request] = []
    items = []
    for length, depth in places:
        for repeat in range(per_place):
            city = _CITIES[int(torch.randint(len(_CITIES), (), generator=generator))]
            number = int(torch.randint(10_000, 100_000, (), generator=generator))
            begin = int(torch.randint(len(long_text) - length + 1, (), generator=generator))
            asked = f"\nThe secret number of {city} is"
            texts = f"{asked} {number}.\n", asked, f" {number}"
            fact, question, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
            hay = list(long_text[begin : begin + length - len(bos) - len(fact) - len(question) - len(answer)])
            at = round(depth * len(hay))
            requests.append(([*bos, *hay[:at], *fact, *hay[at:], *question], answer))
            items.append(f"{length} tokens, depth {depth:g}, {repeat}")
    kept = range(len(items)) if limit is None else torch.linspace(0, len(items) - 1, limit).round().int().tolist()
    return Questions(benchmark, [requests[at] for at in kept], [items[at] for at in kept])


def _check_needle(needle: Needle, tokenizer: Any, n_tokens: int) -> None:
    if tokenizer is None:
        raise MelensError("The benchmark needle needs a tokenizer, and this model has none.")
    if max(needle.lengths) > n_tokens:
        raise MelensError(
            f"The text has {n_tokens} tokens, but the needle needs {max(needle.lengths)}. Give a longer text "
            "with data.text, or lower benchmark.needle.lengths."
        )


def score_questions(scorer: Scorer, questions: Questions, progress: Any = None) -> pd.DataFrame:
    """Score a model on questions: a row for each item, with the columns of `harness.evaluate`."""
    names = [f"{questions.benchmark.name}, item {item}" for item in questions.items]
    scored = scorer.score(questions.requests, progress, names=names)
    (metric,) = questions.benchmark.metrics
    if metric.name == "loss":
        values = [-float(each.log_p.mean()) for each in scored]
    else:  # the share of the tokens, or all of them
        values = [float(each.greedy.float().mean() if metric.name == "acc" else each.greedy.all()) for each in scored]
    items = pd.DataFrame({"item": questions.items, "metric": metric.label, "higher_is_better": metric.higher_is_better})
    empty = dict.fromkeys(["prompt", "response", "thoughts"], "")
    return items.assign(shown=metric.shown, value=values, chance=float("nan"), **empty, unfinished=False)
