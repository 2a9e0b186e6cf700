"""What a model writes with and without a mask, side by side, for a person to read.

    result = melens.analysis.generate(study, melens.WeMask(rate=0.1).at(study.me), prompt="The capital of France is")
    result.tables["generations"]     # both texts, where they part, and how far the mask moves the next token
    result.documents["generate.html"]

1. Each prompt is continued without the mask and with it; samples draw with the same random numbers on both sides.
2. Where the two texts part, the masked model is run once more on the unmasked text: both then have a distribution
   for every token of one text, which KL compares.
3. A page shows the texts side by side, marked from where they part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from melens.analysis.study import Study
from melens.data.chat import PLAIN, Chat, chat_of, prompt_ids, read_reply
from melens.data.prompts import Prompt, tokenize
from melens.environment.seeding import seeded
from melens.errors import MelensError
from melens.masks.mask import WeMask
from melens.models.devices import input_device
from melens.models.generation import verify_generation
from melens.models.kv_cache import find_cache_by_any_name
from melens.models.layout import listed
from melens.printing import Brief
from melens.report.page import render
from melens.report.result import Metrics, Result
from melens.validation.arguments import BosOrNot

__all__ = ["Decoding", "GenerateMetrics", "check_prompts", "generate", "make_chat"]

N_PROMPTS = 4  # where the user gives none


class GenerateMetrics(Metrics):
    """What `generate` measures.

    Attributes:
        mask: in words.
        masks: the mask's arguments, under the name `mask`.
        use_cache: whether both sides keep keys and values.
        cache_error: the larger error of a decode step against the whole sequence, as `verify_generation` gives it.
        thinking: whether a chat model is to think; None without a chat template.
        n_unfinished: texts that end inside a thought.
        written_prompts, n_pairs: prompts that were continued, and pairs of texts.
        identical_share: share of pairs with the same tokens on both sides.
        mean_parted_at: mean index of the first new token that differs, over the pairs that do.
        mean_kl: mean over pairs of `Pair.kl`.
    """

    mask: str = ""
    masks: dict[str, dict[str, Any]] | None = None
    use_cache: bool = True
    cache_error: float = 0.0
    thinking: str | None = None
    n_unfinished: int = 0
    written_prompts: int = 0
    n_pairs: int = 0
    identical_share: float | None = None
    mean_parted_at: float | None = None
    mean_kl: float | None = None


@dataclass(frozen=True)
class Decoding:
    """How a text is written.

    Attributes:
        max_new_tokens: at most.
        sample: draw each token; else the likeliest is taken.
        temperature: of samples.
        top_p: draw among the likeliest tokens that have this probability together.
    """

    max_new_tokens: int = 64
    sample: bool = False
    temperature: float | int = 1.0
    top_p: float | int = 1.0


def generate(
    study: Study,
    mask: WeMask,
    *,
    prompt: str | Sequence[str] | None = None,
    max_new_tokens: int = 64,
    chat: bool = False,
    thinking: bool | Literal["auto"] = "auto",
    sample: bool = False,
    temperature: float | int = 1.0,
    top_p: float | int = 1.0,
    seeds: Sequence[int] = (0,),
    bos: BosOrNot = "auto",
) -> Result:
    """Continue each prompt without the mask and with it, and find where the two texts part.

    Args:
        study: of a model with a tokenizer.
        mask: with its first block settled (`mask.at(study.me)`).
        prompt: a text, or several; None for four short ones of the study's prompts.
        max_new_tokens, sample, temperature, top_p: as of a `Decoding`.
        chat: put the text into the tokenizer's chat template.
        thinking: by the chat template's own switch; "auto" is False where there is one.
        seeds: of a sample each; a greedy text uses none.
        bos: whether a prompt outside a chat begins with BOS; "auto" does as the tokenizer.

    Returns:
        Metrics `GenerateMetrics`; the table `generations`, a row a text: where the two part (`parted_at`, a token
        counted from 0), and `kl`, of the next token along the unmasked text, in nats.

    Raises:
        MelensError: no tokenizer, no chat template, no room for so many tokens, or logits that are NaN.

    Example:
        >>> mask = melens.WeMask(rate=0.3).at(study.me)
        >>> result = melens.analysis.generate(study, mask, prompt="The capital of France is", max_new_tokens=4)
        >>> result.tables["generations"].columns[:5].tolist()
        ['prompt', 'prompt_text', 'seed', 'parted_at', 'kl']
    """
    template = check_prompts(study.model, prompt, max_new_tokens, chat=chat, thinking=thinking, bos=bos)
    mask = mask if mask.fixed is not None else mask.at(study.me).on(study.model)
    prompts = _prompts(study, prompt, template, bos, max_new_tokens)
    checks = [verify_generation(study.model), verify_generation(study.model, mask)]
    if any(math.isnan(check.error) for check in checks):
        raise MelensError("The logits of this model are NaN, so it cannot write a text.")
    decoding = Decoding(max_new_tokens, sample, temperature, top_p)
    use_cache = all(check.use_cache for check in checks)
    progress = study.stage("texts written with and without the mask")
    drawn = [(given, seed) for given in prompts for seed in (seeds if sample else seeds[:1])]
    pairs: list[Pair] = []
    for given, seed in drawn:
        pairs.append(compare(study.model, mask, given, decoding, seed=seed, use_cache=use_cache))
        progress(len(pairs), len(drawn))
    texts = [side.text for pair in pairs for side in (pair.without, pair.masked)]
    parted = [pair.parted_at for pair in pairs if pair.parted_at is not None]
    metrics = study.metrics(
        GenerateMetrics,
        mask=_mask_in_words(mask, study.model),
        masks={"mask": mask.to_dict()},
        use_cache=use_cache,
        cache_error=max(check.error for check in checks),
        thinking=None if template is None else template.in_words(),
        n_unfinished=sum(not read_reply(text, (template or PLAIN).opened).is_finished for text in texts),
        written_prompts=len(prompts),
        n_pairs=len(pairs),
        identical_share=(len(pairs) - len(parted)) / len(pairs),
        mean_parted_at=sum(parted) / len(parted) if parted else None,
        mean_kl=sum(pair.kl for pair in pairs) / len(pairs),
    )
    summary = _in_words(metrics, sampled=sample)
    those_that_part_first = sorted(pairs, key=lambda pair: pair.parted_at is None)
    texts_in_short = [
        (_short(pair.prompt.text, 120), _in_short(pair.without), _in_short(pair.masked))
        for pair in those_that_part_first
    ]
    findings = [
        ("in all", summary),
        ("mask", str(metrics.mask)),
        ("", "without the mask (▶ where they part)", "with the mask"),
        *texts_in_short,
    ]
    title = f"{study.trace.model['name']} with and without a mask"
    page = render_pairs(pairs, title=title, summary=summary, mask=metrics.mask)
    tables = {"generations": pd.DataFrame([_row(pair) for pair in pairs]).astype({"parted_at": "Int64"})}
    return Result("generate", study.trace.model, metrics, tables, findings=findings, documents={"generate.html": page})


def check_prompts(
    model: Any,
    prompt: str | Sequence[str] | None,
    max_new_tokens: int,
    *,
    chat: bool = False,
    thinking: bool | Literal["auto"] = "auto",
    bos: BosOrNot = "auto",
) -> Chat | None:
    """Try what `generate` is given on a model, or on its plan, whose weights are not read yet.

    Returns:
        How the chat template is used, None where it is not.

    Raises:
        MelensError: no tokenizer, no chat template, or no room for the user's prompts and so many tokens.
    """
    if model.tokenizer is None:
        raise MelensError("This model has no tokenizer, so it cannot write a text.")
    template = make_chat(model.tokenizer, thinking) if chat else None
    _check_room([2] if prompt is None else map(len, _ids_of(model, prompt, template, bos)), max_new_tokens, model)
    return template


def make_chat(tokenizer: Any, thinking: bool | Literal["auto"] = "auto") -> Chat:
    """Find how a tokenizer's chat template puts a text, and whether the model is to think.

    Raises:
        MelensError: there is no template, it takes no text of a user, or it has no switch for thinking.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise MelensError("generate.chat is true, but this model's tokenizer has no chat template. Set it to false.")
    return chat_of(tokenizer, None if thinking == "auto" else thinking, option="generate.thinking")


# --- What to continue -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Given(Brief):
    """A prompt: its number, its text, its token ids, and in a chat all that the model reads around the text."""

    number: int
    text: str
    ids: list[int]
    chat: str | None = None


def _prompts(
    study: Study, prompt: str | Sequence[str] | None, chat: Chat | None, bos: BosOrNot, max_new_tokens: int
) -> list[Given]:
    """Return the user's texts, or the shortest of the study's of each task in turn, as the model reads them."""
    tokenizer: Any = study.model.tokenizer
    if prompt is None:
        by_length = study.trace.prompts.sort_values("n_tokens", kind="stable")
        turn = by_length.groupby(by_length["task"].fillna("")).cumcount()
        in_turn = by_length.assign(turn=turn).sort_values("turn", kind="stable")
        ids = [study.tokens[row].tolist() for row in in_turn["prompt"][:N_PROMPTS]]
        texts = [_decode(tokenizer, of_prompt, skip_special_tokens=chat is not None) for of_prompt in ids]
        if chat is not None:
            ids = _ids_of(study.model, texts, chat, bos)
    else:
        texts, ids = [prompt] if isinstance(prompt, str) else list(prompt), _ids_of(study.model, prompt, chat, bos)
    _check_room(map(len, ids), max_new_tokens, study.model)
    return [
        Given(number, text, of_prompt, _decode(tokenizer, of_prompt) if chat is not None else None)
        for number, (text, of_prompt) in enumerate(zip(texts, ids, strict=True))
    ]


def _ids_of(model: Any, prompt: str | Sequence[str], chat: Chat | None, bos: BosOrNot) -> list[list[int]]:
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if chat is not None:
        return [prompt_ids(model.tokenizer, [{"role": "user", "content": text}], chat) for text in texts]
    return tokenize(model, [Prompt(text, id=f"{text!r} of generate.prompt") for text in texts], bos=bos)


def _check_room(lengths: Iterable[int], max_new_tokens: int, model: Any) -> None:
    room = model.cfg.n_ctx - max(lengths)
    if max_new_tokens > room:
        raise MelensError(
            f"generate.max_new_tokens is {max_new_tokens}, but the longest prompt leaves {max(0, room)} tokens of the "
            f"model's context of {model.cfg.n_ctx:,}. Lower it, or shorten the prompt."
        )


# --- Both texts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Side(Brief):
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

    @property
    def text(self) -> str:
        return self.common + self.first + self.rest


@dataclass(frozen=True, repr=False)
class Pair(Brief):
    """A prompt continued without the mask and with it.

    Attributes:
        seed: of the sample; None for greedy texts.
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
    model: TransformerBridge, mask: WeMask, prompt: Given, decoding: Decoding, *, seed: int, use_cache: bool = True
) -> Pair:
    """Continue a prompt without a mask and with it, both sides drawing with the same random numbers."""
    ids, logits = write(model, prompt.ids, decoding, seed=seed, use_cache=use_cache)
    with mask.applied(model):
        masked_ids, masked_logits = write(model, prompt.ids, decoding, seed=seed, use_cache=use_cache)
        at = first_difference(ids, masked_ids)
        if at is not None:  # the masked model on the unmasked text, in calls like those that wrote its own
            _, masked_logits = write(model, prompt.ids, decoding, forced=ids, use_cache=use_cache)
    before, after = logits.log_softmax(-1), masked_logits.log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())

    def side(written: list[int], log_p: Tensor) -> Side:
        of_both = None if at is None else (float(log_p[at, ids[at]]), float(log_p[at, masked_ids[at]]))
        return Side(written, *parts(model.tokenizer, prompt.ids, written, at), of_both)

    seed_used = seed if decoding.sample else None
    return Pair(prompt, seed_used, side(ids, before), side(masked_ids, after), at, kl)


def write(
    model: TransformerBridge,
    ids: Sequence[int],
    decoding: Decoding,
    *,
    seed: int = 0,
    forced: Sequence[int] | None = None,
    use_cache: bool = True,
) -> tuple[list[int], Float[Tensor, "new vocabulary"]]:
    """Continue a prompt until the model ends it or `decoding.max_new_tokens` are written.

    Args:
        model: the bridge, with the hooks already attached that may change something.
        ids: the prompt.
        decoding: how; what the checkpoint has beside it, such as a penalty for repetition, is left out.
        seed: of the sample.
        forced: write these tokens, whatever the model would.
        use_cache: keep keys and values, as `verify_generation` allows.

    Returns:
        The new tokens, and the float32 logits from which each was chosen.
    """
    find_cache_by_any_name(model)
    network: Any = model.original_model
    inputs = torch.tensor([ids], device=input_device(network))
    sample = decoding.sample and forced is None
    with seeded(seed):
        done = network.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=decoding.max_new_tokens if forced is None else len(forced),
            prefix_allowed_tokens_fn=None if forced is None else lambda row, read: [forced[len(read) - len(ids)]],
            do_sample=sample,
            temperature=float(decoding.temperature) if sample else 1.0,
            top_p=float(decoding.top_p) if sample else 1.0,
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
    return done.sequences[0, len(ids) :].tolist(), torch.cat(done.logits).float()


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
    row: dict[str, Any] = {"prompt": pair.prompt.number, "prompt_text": pair.prompt.text, "seed": pair.seed}
    row |= {"parted_at": pair.parted_at, "kl": pair.kl}
    for name, side in (("unmasked", pair.without), ("masked", pair.masked)):
        row |= {f"{name}_text": side.text, f"{name}_n_tokens": len(side.ids), f"{name}_token": side.first or None}
        of_unmasked, of_masked = side.log_probabilities or (None, None)
        row |= {f"{name}_log_p_of_unmasked_token": of_unmasked, f"{name}_log_p_of_masked_token": of_masked}
    return row


def _mask_in_words(mask: WeMask, model: TransformerBridge) -> str:
    """Say what the mask is, with the blocks that it takes hold in."""
    positions = mask.positions if isinstance(mask.positions, str) else list(mask.positions)
    words = f"rate {mask.rate:g}, select {mask.select}, site {mask.site}, positions {positions}, "
    words += listed(mask.blocks(model))
    if mask.select == "random":
        words += f", seed {mask.seed}"
    return words if mask.strength == 1 else f"{words}, strength {mask.strength:g}"


def _in_words(metrics: GenerateMetrics, *, sampled: bool) -> str:
    n, same = metrics.n_pairs, metrics.identical_share or 0
    kind = "sampled" if sampled else "greedy"
    apart = n - round(same * n)
    verb = "changes" if apart < 2 else "change"
    words = f"{apart or 'None'} of {n} {kind} texts {verb} with the mask"
    if n == 1:
        words = f"The {kind} text {'changes with the mask' if apart else 'is the same with the mask'}"
    if apart:
        on_average = " on average" if apart > 1 else ""
        words += f", from token {metrics.mean_parted_at:.3g}{on_average} (counted from 0)"
    thinking = f" Thinking: {metrics.thinking}." if metrics.thinking else ""
    if metrics.n_unfinished:
        thinking += f" {metrics.n_unfinished} of {2 * n} texts end inside a thought."
    along = "text" if n == 1 else "texts"
    return f"{words}. KL of the next token along the unmasked {along}: {metrics.mean_kl:.3g} nats.{thinking}"


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


def render_pairs(pairs: Sequence[Pair], *, title: str, summary: str, mask: str) -> str:
    """Lay texts out side by side on an HTML page that needs no network; from where they part on they are marked."""
    return render("generate.html", title=title, summary=summary, mask=mask, pairs=pairs, parting=_parting_in_words)


def _parting_in_words(pair: Pair) -> str:
    kl = f"KL of the next token along the text without the mask: {pair.kl:.3g} nats."
    if pair.parted_at is None:
        return f"The same tokens on both sides. {kl}"
    tokens = pair.without.first, pair.masked.first
    without, masked = (
        " and ".join(f"{token!r} {math.exp(log_p):.3g}" for token, log_p in zip(tokens, of_side or (), strict=True))
        for of_side in (pair.without.log_probabilities, pair.masked.log_probabilities)
    )
    there = f"Probabilities there: without the mask {without}; with it {masked}."
    return f"They part at token {pair.parted_at}, counted from 0. {there} {kl}"
