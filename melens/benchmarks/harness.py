"""EleutherAI's lm-evaluation-harness over a loaded model: its prompts, filters and metrics, our forward passes.

`evaluate` gives the harness a model class of ours. The harness turns items into requests; a `Scorer` computes the
log-likelihoods, the model itself writes the replies, and `read_reply` takes the thoughts out of a reply before the
harness's filters read a letter, a number or a refusal in it. (The harness would cut thoughts at a single mark,
`think_end_token`, and would take a reply that ends inside a thought for an answer.)

The harness pads in two ways: on the right without an attention mask for log-likelihoods, on the left with one for
generation. A `WeMask` finds token 0 in both, and rows that would change each other's numbers never share a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from melens.benchmarks.scores import check_scores
from melens.benchmarks.scoring import Scorer
from melens.benchmarks.tasks import HarnessTask, quiet_harness
from melens.data.chat import PLAIN, Chat, Reply, decode_reply, prompt_text, read_reply
from melens.environment.seeding import seeded
from melens.errors import MelensError
from melens.models.devices import input_device
from melens.tracing.batching import forget_longest, measured, rule_of

__all__ = ["COLUMNS", "RequestOptions", "check_thinking", "evaluate"]

COLUMNS = (
    "item", "metric", "higher_is_better", "shown", "value", "chance", "prompt", "response", "thoughts", "unfinished",
)  # fmt: skip
"""Columns of a benchmark's items. `chance` is 1 over the number of choices, NaN without choices. `prompt`, `response`
and `thoughts` are empty where the model wrote nothing. `unfinished` is True where the reply ends inside a thought; its
response, from which the answer is read, is then empty."""

Progress = Callable[[int], None]
"""Called with the number of requests done since the last call."""


@dataclass(frozen=True)
class RequestOptions:
    """How a benchmark's requests are put to a model.

    Attributes:
        chat: how prompts are put into the tokenizer's chat template (see `chat_of`); None for plain text.
        sampling: transformers' generation arguments for samples; None for greedy decoding or the task's own arguments.
        max_new_tokens: None for the task's own limit.
        batch_size: how many replies are written together.
    """

    chat: Chat | None = None
    sampling: Mapping[str, Any] | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16


def evaluate(
    network: Any,
    tokenizer: Any,
    task: HarnessTask,
    options: RequestOptions,
    *,
    limit: int | None = None,
    seed: int = 0,
    max_batch_tokens: int = 4096,
    progress: Progress = lambda done: None,
) -> pd.DataFrame:
    """Run a benchmark on a model as it stands, with the mask that is on it.

    Args:
        network, tokenizer: a causal language model of transformers.
        task: as `load_task` returns it.
        options: how its requests are put.
        limit: only the first so many items; of MMLU, of each subject.
        seed: of samples.
        max_batch_tokens: in a forward pass for log-likelihoods.
        progress: called with the number of requests done since the last call.

    Returns:
        A row for each item and metric, with the columns `COLUMNS`.

    Raises:
        MelensError: a log-likelihood, a logit or a score is NaN or infinite (task and item are named); the chat
            template refuses a prompt, or opens a thought where log-likelihoods are wanted.
    """
    check_thinking(task, options.chat)
    from lm_eval.evaluator import evaluate as run

    with quiet_harness(), seeded(seed), ExitStack() as stack:
        lm = _language_model(network, tokenizer, options, max_batch_tokens, progress)
        readers = {}
        for name, of_harness in task.tasks.items():
            of_harness.set_config("num_fewshot", 0)
            of_harness.set_fewshot_seed(seed)
            if task.generates:
                readers[name] = stack.enter_context(_generating(of_harness, options, lm.max_length))
        tasks, in_chat = {"tasks": task.tasks, "groups": {}}, options.chat is not None
        results = run(lm, tasks, limit=limit, bootstrap_iters=0, apply_chat_template=in_chat)
    rows = [row for name, own in results["samples"].items() for row in _rows(name, own, task, readers.get(name))]
    items = pd.DataFrame(rows, columns=list(COLUMNS))
    check_scores((f"{task.benchmark.name}, item {item}" for item in items["item"]), items["value"], "score")
    return items


def check_thinking(task: HarnessTask, chat: Chat | None) -> None:
    """Raise a `MelensError` where choices would be scored as the beginning of a thought."""
    if chat is not None and not task.generates and (chat.thinking or chat.opened):
        remedy = "benchmark.thinking=false" if chat.thinking else "benchmark.chat=false"
        raise MelensError(
            f"{task.benchmark.name} is scored by the log-likelihoods of its answers, which leaves no room for "
            f"thoughts, but thinking is {chat.in_words()}. Set benchmark.mode=generate, or {remedy}."
        )


# --- The harness's model ----------------------------------------------------------------------------------------------


def _language_model(
    network: Any, tokenizer: Any, options: RequestOptions, max_batch_tokens: int, progress: Progress
) -> Any:
    """Return the harness's view of a model: its own tokenisation and generation, our log-likelihoods."""
    from lm_eval.models.huggingface import HFLM

    class MelensLM(HFLM):
        @property
        def device(self) -> torch.device:
            return input_device(network)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            # The harness would drop a system message that the template refuses
            assert options.chat is not None
            assert add_generation_prompt
            return prompt_text(self.tokenizer, chat_history, options.chat)

        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
            if skip_special_tokens and isinstance(tokens, list):
                return decode_reply(self.tokenizer, tokens)
            return str(super().tok_decode(tokens, skip_special_tokens=skip_special_tokens))

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            self._requests: Iterable[Any] = requests
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            found = []
            for request in requests:  # one by one, so that each window's error names its own item
                self._requests = repeat(request)
                found += super().loglikelihood_rolling([request], disable_tqdm=True)
            return found

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            self._task = requests[0].task_name
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = True, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            scorer = Scorer(network, max_length=self.max_length, max_batch_tokens=max_batch_tokens)
            pairs = [(context, continuation) for _, context, continuation in requests]
            names = [f"{of.task_name}, item {of.doc_id}" for of, _ in zip(self._requests, pairs, strict=False)]
            scored = scorer.score(pairs, progress, names=names)
            return [(float(each.log_p.sum()), bool(each.greedy.all())) for each in scored]

        def _model_generate(
            self, context: Tensor, max_length: int, stop: list[str], *, attention_mask: Tensor, **arguments: Any
        ) -> Tensor:
            width = context.shape[1]
            written = context.new_full((len(context), max_length), self.tokenizer.pad_token_id)
            written[:, :width] = context
            for rows, length in _groups(network, attention_mask.sum(-1).tolist(), max_length - width):
                forget_longest(network)
                own, mask = context[rows, width - length :], attention_mask[rows, width - length :]
                arguments["logits_processor"] = [_FiniteLogits(self._task, own, self.tokenizer)]
                most = max_length - width + length
                found = super()._model_generate(own, most, stop, attention_mask=mask, **arguments)[:, length:]
                written[rows, width : width + found.shape[1]] = found
                progress(len(rows))
            return written

    return MelensLM(pretrained=network, tokenizer=tokenizer, backend="causal", batch_size=options.batch_size)


def _groups(network: Any, lengths: Sequence[int], n_new: int) -> list[tuple[list[int], int]]:
    """Group prompts whose replies may be written together, padded on the left to the longest of each group."""
    rule = measured(network, rule_of(network), padding="left")
    if not rule.may_share([min(lengths), max(lengths) + n_new]):  # rows would cross a length limit at different steps
        rule = replace(rule, equal_beyond=0)
    groups = rule.groups(lengths, max_batch_tokens=sys.maxsize, max_padding=1.0, longest_first=True)
    return [(rows, max(lengths[row] for row in rows)) for rows in groups]


class _FiniteLogits:
    """Stops a generation whose logits hold NaN: greedy decoding would take NaN for the likeliest token."""

    def __init__(self, task: str, context: Tensor, tokenizer: Any) -> None:
        self._task, self._context, self._tokenizer = task, context, tokenizer

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        broken = logits.isnan().any(-1).nonzero()
        if len(broken):
            prompt = self._tokenizer.decode(self._context[int(broken[0])], skip_special_tokens=True)
            name = f"{self._task}, item that begins {' '.join(prompt.split())[:50]!r}"
            check_scores([name], [float("nan")], "logit of a next token")
        return logits


# --- Replies ----------------------------------------------------------------------------------------------------------

_Reader = Callable[[str], Reply]
"""Takes the thoughts out of a reply, and cuts its answer at a stop sequence."""


@contextmanager
def _generating(of_harness: Any, options: RequestOptions, max_length: int) -> Iterator[_Reader]:
    """Give a task of the harness the generation options, and let its filters read the answers alone.

    Its own arguments and filters are restored at the end: the next model or job may use others.
    """
    from lm_eval.models.utils import postprocess_generated_text

    before = of_harness.config.generation_kwargs
    own = dict(before or {})
    until = own.get("until")

    def read(text: str) -> Reply:
        reply = read_reply(text, (options.chat or PLAIN).opened)
        return replace(reply, answer=postprocess_generated_text(reply.answer, until, None))

    def answers(replies: Iterable[Sequence[str]], docs: Sequence[Any]) -> list[list[str]]:
        return [[read(reply).answer for reply in of_doc] for of_doc in replies]

    if options.chat is not None:
        own["until"] = []  # a stop sequence such as "Question:" may occur in a thought, which it must not end
    own["max_gen_toks"] = min(options.max_new_tokens or own.get("max_gen_toks", 256), max_length // 2)
    if options.sampling is not None:
        own |= {"do_sample": True, **options.sampling}
    of_harness.set_config("generation_kwargs", own)
    filters = [ensemble.filters for ensemble in of_harness._filters]
    for ensemble in of_harness._filters:
        ensemble.filters = [lambda: SimpleNamespace(apply=answers), *ensemble.filters]
    try:
        yield read
    finally:
        of_harness.set_config("generation_kwargs", before)
        for ensemble, own_filters in zip(of_harness._filters, filters, strict=True):
            ensemble.filters = own_filters


def _rows(
    name: str, samples: Sequence[Mapping[str, Any]], task: HarnessTask, read: _Reader | None
) -> Iterator[tuple[Any, ...]]:
    """Yield `COLUMNS` of the harness's records of one task; without a reader, the model wrote nothing."""
    prefix = "" if name == task.benchmark.name else f"{name}/"
    for sample in samples:
        n_choices = len(sample["arguments"])
        reply = Reply("") if read is None else read(str(sample["resps"][0][0]))
        for metric in task.metrics:
            if metric.name not in sample or sample["filter"] != metric.filter:
                continue
            value = sample[metric.name]
            if metric.name == "word_perplexity":  # the harness gives the log-likelihood and the number of words
                value = -value[0] / value[1]
            what = (f"{prefix}{sample['doc_id']}", metric.label, metric.higher_is_better, metric.shown)
            chance = 1 / n_choices if n_choices > 1 else float("nan")
            prompt = str(sample["arguments"][0][0]) if task.generates else ""
            yield *what, float(value), chance, prompt, reply.answer, reply.thoughts, not reply.is_finished
