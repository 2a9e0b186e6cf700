"""What a model writes with and without a mask, side by side, for a person to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from string import Template
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import LogitsProcessor, LogitsProcessorList

from experiments.options import Options
from experiments.options.schema import GenerateOptions
from experiments.runner.legacy import KeptOptions
from experiments.runner.masks import only_mask_of
from experiments.runner.study import Run as Study
from melens import MelensError, Probe, Prompt, WeMask
from melens.data.chat import PLAIN, Chat, chat_of, prompt_ids, read_reply
from melens.data.prompts import tokenize
from melens.environment.seeding import seeded
from melens.models.devices import input_device
from melens.models.generation import verify_generation
from melens.models.kv_cache import find_cache_by_any_name
from melens.models.loading import load_tokenizer
from melens.report.result import Result

N_PROMPTS = 4  # where the user gives none


def probes(model: TransformerBridge, options: KeptOptions) -> list[Probe]:
    """The mask only needs the ME layer, which the default probes find."""
    return []


def check_chat(cfg: Options) -> None:
    """Try the chat template of the model, before it is loaded.

    Raises:
        MelensError: there is none, it takes no text of a user, or it has no switch for thinking.
    """
    if cfg.generate.chat:
        _chat(load_tokenizer(**cfg.model.model_dump(exclude_unset=True)), cfg.generate)


def _chat(tokenizer: Any, generation: GenerateOptions) -> Chat:
    if not getattr(tokenizer, "chat_template", None):
        raise MelensError("generate.chat is true, but this model's tokenizer has no chat template.")
    thinking = None if generation.thinking == "auto" else generation.thinking
    return chat_of(tokenizer, thinking, option="generate.thinking")


def run(study: Study, options: KeptOptions) -> Result:
    """Continue each prompt without the mask and with it, and find where the two texts part."""
    generation = study.cfg.generate
    if study.model.tokenizer is None:
        raise MelensError("This model has no tokenizer, so it has no text to write.")
    mask = only_mask_of(study.cfg.wemask, study.me, study.model)
    if mask is None:
        raise MelensError("wemask.rate is 0: without a mask there is nothing to compare; give a rate over 0.")
    chat = _chat(study.model.tokenizer, generation) if generation.chat else None
    prompts = _prompts(study, chat)
    ways = [verify_generation(study.model), verify_generation(study.model, mask)]
    if any(math.isnan(way.error) for way in ways):
        raise MelensError("The logits of this model are NaN, so it has no text to write.")
    use_cache = all(way.use_cache for way in ways)
    seeds = list(generation.seeds) if generation.sample else [generation.seeds[0]]
    progress = study.stage("texts written with and without the mask")
    pairs: list[Pair] = []
    for prompt in prompts:
        for seed in seeds:
            pairs.append(compare(study.model, mask, prompt, generation, seed=seed, use_cache=use_cache))
            progress(len(pairs), len(prompts) * len(seeds))
    metrics = study.metrics(
        mask=_mask_in_words(mask, study.model),
        masks={} if mask is None else {"mask": mask.to_dict()},
        use_cache=use_cache,
        cache_error=max(way.error for way in ways),
        thinking=None if chat is None else chat.in_words(),
        n_unfinished=sum(not _is_finished(side, chat) for pair in pairs for side in (pair.without, pair.masked)),
        written_prompts=len(prompts),
        n_pairs=len(pairs),
        identical_share=sum(pair.parted_at is None for pair in pairs) / len(pairs),
        mean_parted_at=_mean([pair.parted_at for pair in pairs if pair.parted_at is not None]),
        mean_kl=_mean([pair.kl for pair in pairs]),
    )
    summary = _in_words(metrics, sampled=generation.sample)
    findings = [
        ("", "without the mask (▶ where they part)", "with the mask"),
        *((_short(pair.prompt.text, 120), _in_short(pair.without), _in_short(pair.masked)) for pair in pairs),
        ("in all", summary, metrics["mask"]),
    ]
    page = render(
        pairs, title=f"{study.trace.model['name']} with and without a mask", summary=summary, mask=metrics["mask"]
    )
    tables = {"generations": pd.DataFrame([_row(pair) for pair in pairs]).astype({"parted_at": "Int64"})}
    return Result("generate", study.trace.model, metrics, tables, findings=findings, documents={"generate.html": page})


# --- What to continue -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """A prompt: its number, its text, its token ids, and in a chat all that the model reads around the text."""

    number: int
    text: str
    ids: list[int]
    chat: str | None = None


def _prompts(study: Study, chat: Chat | None) -> list[Given]:
    """Return the user's texts, or short ones of the run's, as the model reads them."""
    tokenizer: Any = study.model.tokenizer
    generation = study.cfg.generate
    if generation.prompt is None:
        ids = [study.tokens[row].tolist() for row in _short_prompts(study.trace.prompts)]
        texts = [_decode(tokenizer, of_prompt, skip_special_tokens=chat is not None) for of_prompt in ids]
    else:
        texts = [generation.prompt] if isinstance(generation.prompt, str) else list(generation.prompt)
        ids = []
    if chat is not None:
        ids = [prompt_ids(tokenizer, [{"role": "user", "content": text}], chat) for text in texts]
    elif not ids:
        named = [Prompt(text, id=f"{text!r} of generate.prompt") for text in texts]
        ids = tokenize(study.model, named, bos=study.cfg.prompts.bos)
    room = study.model.cfg.n_ctx - max(map(len, ids))
    if generation.max_new_tokens > room:
        raise MelensError(
            f"generate.max_new_tokens is {generation.max_new_tokens}, but the longest prompt leaves {max(0, room)} "
            f"tokens of the model's context of {study.model.cfg.n_ctx:,}."
        )
    return [
        Given(number, text, of_prompt, _decode(tokenizer, of_prompt) if chat is not None else None)
        for number, (text, of_prompt) in enumerate(zip(texts, ids, strict=True))
    ]


def _short_prompts(prompts: pd.DataFrame) -> list[int]:
    """Choose the shortest prompts, of each task in turn."""
    by_length = prompts.sort_values("n_tokens", kind="stable")
    turn = by_length.groupby(by_length["task"].fillna("")).cumcount()
    chosen: list[int] = by_length.assign(turn=turn).sort_values("turn", kind="stable")["prompt"].tolist()
    return chosen[:N_PROMPTS]


# --- Both texts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A text with the mask or without.

    Attributes:
        ids: its tokens, with the one that ended it.
        common, first, rest: the text up to where the two part, the first token that differs, and what follows.
        log_probabilities: where they part, those of the two tokens under this model (without the mask's token first);
            None where they do not part.
    """

    ids: list[int]
    common: str
    first: str
    rest: str
    log_probabilities: tuple[float, float] | None


@dataclass(frozen=True)
class Pair:
    """A prompt continued without the mask and with it.

    Attributes:
        prompt: what is continued.
        seed: of the sample; None for greedy texts.
        without, masked: the texts.
        parted_at: index of the first new token that differs, None where all are the same.
        kl: KL(unmasked ‖ masked) of the next-token distribution in nats, mean over the unmasked text's tokens.
    """

    prompt: Given
    seed: int | None
    without: Side
    masked: Side
    parted_at: int | None
    kl: float


def compare(
    model: TransformerBridge,
    mask: WeMask,
    prompt: Given,
    generation: GenerateOptions,
    *,
    seed: int,
    use_cache: bool = True,
) -> Pair:
    """Continue a prompt without a mask and with it, both sides drawing with the same random numbers.

    Args:
        model: a bridge with a tokenizer attached.
        mask: with its dims settled.
        prompt: what to continue.
        generation: the options of the node `generate`.
        seed: of the sample.
        use_cache: keep keys and values, as `verify_generation` allows.
    """
    ids, logits = write(model, prompt.ids, generation, seed=seed, use_cache=use_cache)
    with mask.applied(model):
        masked_ids, masked_logits = write(model, prompt.ids, generation, seed=seed, use_cache=use_cache)
        at = first_difference(ids, masked_ids)
        if at is not None:  # the masked model on the unmasked text, in calls like those that wrote its own
            _, masked_logits = write(model, prompt.ids, generation, forced=ids, use_cache=use_cache)
    before, after = logits.log_softmax(-1), masked_logits.log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())

    def side(written: list[int], log_p: Tensor) -> Side:
        of_both = None if at is None else (float(log_p[at, ids[at]]), float(log_p[at, masked_ids[at]]))
        return Side(written, *parts(model.tokenizer, prompt.ids, written, at), of_both)

    seed_used = seed if generation.sample else None
    return Pair(prompt, seed_used, side(ids, before), side(masked_ids, after), at, kl)


class _Forced(LogitsProcessor):
    """Lets generation write given tokens, whatever the model would."""

    def __init__(self, n_prompt: int, ids: Sequence[int]) -> None:
        self._n_prompt, self._ids = n_prompt, ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -math.inf)
        forced[:, self._ids[input_ids.shape[1] - self._n_prompt]] = 0
        return forced


def write(
    model: TransformerBridge,
    ids: Sequence[int],
    generation: GenerateOptions,
    *,
    seed: int = 0,
    forced: Sequence[int] | None = None,
    use_cache: bool = True,
) -> tuple[list[int], Float[Tensor, "new vocabulary"]]:
    """Continue a prompt until the model ends it or `generate.max_new_tokens` are written.

    Args:
        model: the bridge, with the hooks already attached that may change something.
        ids: the prompt.
        generation: the options of the node `generate`; what the checkpoint has beside them, as a penalty for
            repetition, is left out.
        seed: of the sample.
        forced: write these tokens.
        use_cache: keep keys and values.

    Returns:
        The new tokens, and the float32 logits from which each was chosen.
    """
    find_cache_by_any_name(model)
    network: Any = model.original_model
    device = input_device(network)
    inputs = torch.tensor([ids], device=device)
    sample = generation.sample and forced is None
    with seeded(seed):
        done = network.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=generation.max_new_tokens if forced is None else len(forced),
            logits_processor=LogitsProcessorList([] if forced is None else [_Forced(len(ids), forced)]),
            do_sample=sample,
            temperature=float(generation.temperature) if sample else 1.0,
            top_p=float(generation.top_p) if sample else 1.0,
            top_k=0 if sample else 50,  # its default, which greedy choice does not look at
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            num_beams=1,
            eos_token_id=_ends(model),
            pad_token_id=0,  # of a single row nothing is padded
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
    new: list[int] = done.sequences[0, len(ids) :].tolist()
    return new, torch.cat(done.logits).float()


def _ends(model: TransformerBridge) -> list[int] | None:
    """Return the tokens that end a text, by the checkpoint and by its tokenizer."""
    of_checkpoint: Any = model.original_model.generation_config.eos_token_id
    ends = list(of_checkpoint) if isinstance(of_checkpoint, list | tuple) else [of_checkpoint]
    ends.append(getattr(model.tokenizer, "eos_token_id", None))
    return sorted({end for end in ends if end is not None}) or None


def first_difference(left: Sequence[Any], right: Sequence[Any]) -> int | None:
    """Return the first index at which two sequences differ, or one of them has ended; None if they are the same."""
    return next((index for index, (a, b) in enumerate(zip_longest(left, right)) if a != b), None)


def parts(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], at: int | None) -> tuple[str, str, str]:
    """Cut a continuation's text where token `at` begins and ends: what comes before, the token, what follows.

    A token that ends within a character counts with those that complete it.
    """
    whole = _decode(tokenizer, [*prompt, *ids])

    def end_of(n_new: int) -> int:
        end = first_difference(_decode(tokenizer, [*prompt, *ids[:n_new]]), whole)
        return len(whole) if end is None else end

    start = end_of(0)
    if at is None:
        return whole[start:], "", ""
    parted = end_of(at)
    end = next((end for n_new in range(at + 1, len(ids) + 1) if (end := end_of(n_new)) > parted), len(whole))
    return whole[start:parted], whole[parted:end], whole[end:]


def _decode(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return text


# --- In numbers and words ---------------------------------------------------------------------------------------------


def _row(pair: Pair) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": pair.prompt.number,
        "prompt_text": pair.prompt.text,
        "seed": pair.seed,
        "parted_at": pair.parted_at,
        "kl": pair.kl,
    }
    for name, side in (("unmasked", pair.without), ("masked", pair.masked)):
        unmasked_token, masked_token = side.log_probabilities or (None, None)
        row |= {
            f"{name}_text": side.common + side.first + side.rest,
            f"{name}_n_tokens": len(side.ids),
            f"{name}_token": side.first or None,
            f"{name}_log_p_of_unmasked_token": unmasked_token,
            f"{name}_log_p_of_masked_token": masked_token,
        }
    return row


def _is_finished(side: Side, chat: Chat | None) -> bool:
    """Tell whether a text ends behind its thoughts."""
    return read_reply(side.common + side.first + side.rest, (chat or PLAIN).opened).is_finished


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _mask_in_words(mask: WeMask, model: TransformerBridge) -> str:
    """Say what the mask is, with the blocks that it takes hold in."""
    blocks = mask.blocks(model)
    where = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {', '.join(map(str, blocks))}"
    if len(blocks) > 2 and blocks == tuple(range(blocks[0], blocks[-1] + 1)):
        where = f"blocks {blocks[0]} to {blocks[-1]}"
    positions = mask.positions if isinstance(mask.positions, str) else list(mask.positions)
    words = f"rate {mask.rate:g}, select {mask.select}, site {mask.site}, positions {positions}, {where}"
    if mask.select == "random":
        words += f", seed {mask.seed}"
    return words if mask.strength == 1 else f"{words}, strength {mask.strength:g}"


def _in_words(metrics: dict[str, Any], *, sampled: bool) -> str:
    n = metrics["n_pairs"]
    kind = "sampled" if sampled else "greedy"
    apart = n - round(metrics["identical_share"] * n)
    words = f"{apart} of {n} {kind} text{'s' if n > 1 else ''} change{'s' if apart == 1 else ''} with the mask"
    if apart:
        words += f", from token {metrics['mean_parted_at']:.1f} on average (counted from 0)"
    thinking = f" Thinking: {metrics['thinking']}." if metrics["thinking"] else ""
    if metrics["n_unfinished"]:
        thinking += f" {metrics['n_unfinished']} of {2 * n} texts end inside a thought."
    return f"{words}. KL of the next token along the unmasked texts: {metrics['mean_kl']:.3g} nats.{thinking}"


def _in_short(side: Side) -> str:
    if not side.first:
        return _short(side.common, 240)
    common = _in_a_line(side.common)
    common = common if len(common) <= 60 else f"…{common[-60:]}"
    return f"{common}▶{_short(side.first + side.rest, 180)}"


def _short(text: str, most: int) -> str:
    text = _in_a_line(text)
    return text if len(text) <= most else f"{text[:most]}…"


def _in_a_line(text: str) -> str:
    """Let a terminal show a text whatever characters it holds."""
    return "".join("⏎" if char == "\n" else char if char.isprintable() else "�" for char in text)


# --- As a page --------------------------------------------------------------------------------------------------------


def render(pairs: Sequence[Pair], *, title: str, summary: str, mask: str) -> str:
    """Lay texts out side by side on an HTML page that needs no network; from where they part on they are marked."""
    return Template(_PAGE).substitute(
        title=escape(title),
        summary=escape(summary),
        mask=escape(mask),
        style=_STYLE,
        sections="\n".join(_section(pair) for pair in pairs),
    )


def _section(pair: Pair) -> str:
    name = f"Prompt {pair.prompt.number + 1}" + ("" if pair.seed is None else f", seed {pair.seed}")
    chat = ""
    if pair.prompt.chat is not None:
        chat = f"<details><summary>In the chat template</summary><pre>{escape(pair.prompt.chat)}</pre></details>"
    columns = "".join(
        f"<article><h3>{name} <small>{len(side.ids)} tokens</small></h3><pre>{_marked(side)}</pre></article>"
        for name, side in (("Without the mask", pair.without), ("With the mask", pair.masked))
    )
    return (
        f'<section><h2>{name}</h2><pre class="prompt">{escape(pair.prompt.text)}</pre>{chat}'
        f'<div class="sides">{columns}</div><p class="note">{escape(_parting_in_words(pair))}</p></section>'
    )


def _marked(side: Side) -> str:
    if not side.first:
        return escape(side.common)
    first = escape(side.first.replace("\n", "⏎\n"))
    return f"{escape(side.common)}<mark>{first}</mark><span>{escape(side.rest)}</span>"


def _parting_in_words(pair: Pair) -> str:
    kl = f"KL of the next token along the text without the mask: {pair.kl:.3g} nats."
    if pair.without.log_probabilities is None or pair.masked.log_probabilities is None:
        return f"The same tokens on both sides. {kl}"
    tokens = [repr(side.first) for side in (pair.without, pair.masked)]
    of = [
        " and ".join(
            f"{token} {math.exp(p):.3g}" for token, p in zip(tokens, side.log_probabilities or (), strict=True)
        )
        for side in (pair.without, pair.masked)
    ]
    return (
        f"They part at token {pair.parted_at}, counted from 0. Probabilities there: without the mask {of[0]}; with it "
        f"{of[1]}. {kl}"
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
<p>$summary</p>
<p>Mask: $mask.</p>
<p class="note">Marked is what follows once the two part: <mark>the first token that differs</mark><span
class="after"> and the rest</span>. Probabilities and KL are the model's own, before any temperature.</p>
$sections
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --quiet: #5a5a5a; --line: #ddd; --box: #f5f5f5;
  --first: #f5b942; --after: #fdf0d0 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #16181b; --quiet: #a8a8a8; --line: #3a3d42; --box: #212429;
    --first: #a86a00; --after: #43341a }
}
body { margin: 0; font: 16px/1.5 Helvetica, Arial, sans-serif; color: var(--text); background: var(--page) }
main { max-width: 1120px; margin: 0 auto; padding: 16px }
h1 { font-size: 1.7em; line-height: 1.2 } h2 { font-size: 1.25em; margin: 2em 0 .4em } h3 { font-size: 1em; margin: 0 }
small { font-weight: normal; color: var(--quiet) } .note, details { color: var(--quiet); font-size: .85em }
pre { margin: .3em 0; font: inherit; white-space: pre-wrap; overflow-wrap: anywhere }
.prompt { background: var(--box); border-left: 4px solid var(--line); padding: 8px 12px }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; margin-top: 12px }
article { border-top: 2px solid var(--line); padding-top: 8px; min-width: 0 }
mark, article span, .after { -webkit-box-decoration-break: clone; box-decoration-break: clone; padding: 1px 0 }
mark { background: var(--first); color: var(--text) } article span, .after { background: var(--after) }
@media (max-width: 700px) { .sides { grid-template-columns: 1fr } }
"""
