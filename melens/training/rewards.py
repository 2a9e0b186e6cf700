r"""GRPO's rewards for the answer to a maths problem, and a check for right answers that can never be rewarded.

A completion is right (`is_right`) if its final answer, after its thoughts, is

1. the same text as the right one, apart from markup: "yes", "(A)", "2:30", `\boxed{50\%}` for 50%;
2. or the same number: 12 for "12 dollars", 20 for "€20", 1000 for "1e3";
3. or the same mathematics, as math-verify reads the completion: `\frac{1}{2}` for 0.5. Words and times of day are not
   given to math-verify, which reads "yes" as the product y·e·s and 2:30 as a fifteenth.

It is wrong if it marks several final answers, "5 or 6": GRPO would teach the model to hedge.

`check_answers` finds rows whose right answer is wrong even as a completion of its own: they would only earn 0.
"""

from __future__ import annotations

import logging
import re
import threading
import unicodedata
import warnings
from collections.abc import Sequence
from decimal import Decimal
from functools import cache
from typing import Any, NamedTuple

from melens.benchmarks.answers import LETTERS, chosen_letter
from melens.data.chat import decode_reply, read_reply
from melens.errors import MelensError

__all__ = ["check_answers", "is_right", "reward_answer", "reward_format"]

MOST_UNGRADED = 0.1
"""Largest share of right answers for which no completion can be rewarded."""

MOST_WORDS = 5
"""Most words of a right answer that is compared as a text: no model repeats a sentence word by word."""


def reward_answer(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """Return 1 for each completion that is right, else 0; one that ends inside a thought is not.

    Args:
        completions: texts, or conversations of one message.
        answer: the right answers, as numbers, LaTeX, a letter, a time or a few words.
        columns: TRL's and the trainer's: `opened`, of `Chat`; `completion_ids` and `tokenizer`, because the marks of
            thoughts may be special tokens, without which TRL decodes the completions.
    """
    return [float(is_right(text, right)) for text, right in zip(_answers(completions, columns), answer, strict=True)]


def reward_format(completions: Sequence[Any], **columns: Any) -> list[float]:
    r"""Return 1 for each completion that ends in its answer: `\boxed{72}`, `#### 72` or "the answer is 72"."""
    return [float(_ends_in_answer(_marked(text))) for text in _answers(completions, columns)]


def _ends_in_answer(found: _Marked | None) -> bool:
    return found is not None and bool(_ENDED.fullmatch(found.after)) and not _UNKNOWN.match(_plain(found.answer))


def _answers(completions: Sequence[Any], columns: dict[str, Any]) -> list[str]:
    tokenizer, ids = columns.get("tokenizer"), columns.get("completion_ids")
    if tokenizer is not None and ids is not None:
        texts = [decode_reply(tokenizer, list(of_one)) for of_one in ids]
    else:
        texts = [str(one if isinstance(one, str) else one[-1]["content"]) for one in completions]
    return [read_reply(text, columns.get("opened", "")).answer for text in texts]


def check_answers(answers: Sequence[str], name: str) -> None:
    """Warn of right answers that no completion could be rewarded for.

    Raises:
        MelensError: they are more than `MOST_UNGRADED` of all.
    """
    ungraded = [(number, right) for number, right in enumerate(answers, 1) if not _is_graded(right)]
    if not ungraded:
        return
    first = ", ".join(f"row {number} ({' '.join(right.split())[:40]!r})" for number, right in ungraded[:3])
    more = ", ..." if len(ungraded) > 3 else ""
    warning = (
        f"{name}: {len(ungraded)} of {len(answers)} right answers can never be rewarded: {first}{more}. An answer must "
        f"be a number, LaTeX, a letter, a time or up to {MOST_WORDS} words."
    )
    if len(ungraded) > MOST_UNGRADED * len(answers):
        raise MelensError(
            f"{warning} At most {MOST_UNGRADED:.0%} may differ. Set training.columns to the right column."
        )
    warnings.warn(warning, stacklevel=2)


@cache
def _is_graded(right: str) -> bool:
    return all(is_right(text.format(right), right) for text in (r"\boxed{{{}}}", "The answer is {}."))


# --- Grading ----------------------------------------------------------------------------------------------------------


def is_right(completion: str, right: str) -> bool:
    """Return whether a completion, without its thoughts, gives the right answer (as for `reward_answer`)."""
    gold = _plain(right)
    if _says_nothing(gold) or len(_WORD.findall(gold)) > MOST_WORDS:
        return False
    if re.fullmatch(f"[{LETTERS}]", gold) and chosen_letter(completion, LETTERS) == gold:
        return True
    found = _marked(completion)
    answer = found.answer if found else completion.strip().rpartition("\n")[2]
    given = _plain(answer)
    if _FEW_WORDS.fullmatch(gold):
        return gold.casefold() in (given.casefold(), re.split(r"[,;](?! ?or\b)", given.casefold())[0])
    if given.replace(" ", "") == gold.replace(" ", ""):
        return True
    if _TIME.fullmatch(gold):
        return False
    number = _quantity(gold)
    are_several = number is None and _SEVERAL_RIGHT.search(gold) is not None
    if found and not are_several:
        answer = _REASON.split(answer)[0]
        given = _plain(answer)
    other = _quantity(given)
    if number is not None and other is not None:
        if not _is_same_unit(number.unit, other.unit):
            return False  # 12 dollars are not 12 cents
        if number.value == other.value or number.share == other.share:
            return True
    forms = [right] if number is None else number.written()
    if found is None:  # math-verify does not see a number behind an escaped dollar
        return _is_same_mathematics(completion.replace(r"\$", ""), forms)
    if other is not None:  # math-verify does not read units: 5 million is not 5, and 50% is a half
        return _is_same_mathematics(f"${other.share:f}$", [right] if number is None else [f"{number.share:f}"])
    if _has_several(given) and not are_several:  # math-verify takes the first, which would reward a hedge
        return False
    return _is_same_mathematics(f"{found.mark} {answer}{'}' if found.mark.endswith('{') else ''}", forms)


_WORD = re.compile(r"[^\W\d_]{2,}")
_FEW_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)+|no|[^\W\d_]{3,}")
_TIME = re.compile(r"\d{1,2}(?::\d\d){1,2}(?: ?[ap]\.?m\.?)?|\d{1,2} ?[ap]\.?m\.?", re.IGNORECASE)
_NO_ANSWER = re.compile(r"n/?a|none|null|nan|see (?:above|below|solution|explanation|proof)", re.IGNORECASE)
_UNKNOWN = re.compile(r"\W*(?:un(?:clear|known|certain)|not (?:clear|known|certain|sure)|n/a)\b", re.IGNORECASE)
_REASON = re.compile(  # "5, because …" gives a reason; "5, maybe 6" does not
    r"(?<!\\)[,;]\s*(?!(?:or|and|to|but|maybe|perhaps|possibly|probably|likely)\b)(?=[a-z]{2}|[a-z]['’ ][a-z])",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"[(\[{][^()\[\]{}]*[)\]}]")
_SEVERAL = re.compile(r"(?:\b(?:and|to)\b|[;&]|(?<!\d),|,(?!\d{3}(?!\d))).*[\d\\]", re.IGNORECASE)

_SEVERAL_RIGHT = re.compile(r"\b(?:or|and|to)\b|[,;&±]|\\[pm][mp](?![a-z])", re.IGNORECASE)


def _says_nothing(gold: str) -> bool:
    """Return whether a right answer is missing: N/A, or punctuation only; a sign like ∞ or < may be an answer."""
    return _NO_ANSWER.fullmatch(gold) is not None or all(unicodedata.category(one)[0] in "PZ" for one in gold)


def _has_several(text: str) -> bool:
    """Return whether a text gives several answers, or a range; a tuple, an interval and 1,000 are one answer."""
    outside, inside = text, ""
    while outside != inside:
        outside, inside = _BRACKETED.sub("0", outside), outside
    return re.search(r"\bor\b", text, re.IGNORECASE) is not None or _SEVERAL.search(outside) is not None


def _is_same_unit(one: str, other: str) -> bool:
    """Return whether units may be the same: one is missing, or short for the other, like ft, hrs and mph."""
    short, long = sorted((one, other), key=len)
    words = long.split()
    if not short or short == long or short == words[0].rstrip("s"):  # 10 apples are 10 apples left
        return True
    if len(words) > 1:  # as mph is miles per hour; of two words, c m may be centimetres or cubic metres
        return len(words) > 2 and short == "".join(word[0] for word in words)
    return short[0] == long[0] and re.search(".*".join(map(re.escape, short)), long) is not None


def _is_same_mathematics(completion: str, right: Sequence[str]) -> bool:
    from math_verify import parse, verify

    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    limit = 5 if threading.current_thread() is threading.main_thread() else None  # its signals work nowhere else
    gold = [read for form in right for read in parse(f"${form}$", parsing_timeout=limit)]
    return bool(verify(gold, parse(completion, parsing_timeout=limit), timeout_seconds=limit))


# --- What stands in a text --------------------------------------------------------------------------------------------

_MARK = re.compile(
    r"\\f?boxed\s*\{|####|\banswer\b[^.\n:=]{0,30}?(?:\bis\b(?: ?[:：])?|[:：=])[\s*]*(?=\S)", re.IGNORECASE
)
_ENDED = re.compile(r"[\s.$*\])\\]*")


class _Marked(NamedTuple):
    mark: str
    answer: str
    after: str


def _marked(text: str) -> _Marked | None:
    """Return the final answer that is marked, and what follows it; None where none is marked."""
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    mark, rest = marks[-1][0], text[marks[-1].end() :]
    if not mark.endswith("{"):
        line, _, after = rest.strip(" *").partition("\n")
        answer = re.split(r"(?<!\\)[.!](?=\s|$)", line)[0]
        return _Marked(mark, answer, after) if answer.strip() else None
    depth = 1
    for at, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if not depth:
            return _Marked(mark, rest[:at], rest[at + 1 :]) if rest[:at].strip() else None
    return None


_COMMANDS = re.compile(r"\\(?:text(?:bf|rm|it|sf)?|math(?:bf|rm|it|sf)?|mbox|operatorname)\s*\{([^{}]*)\}")


def _plain(text: str) -> str:
    """Return an answer without markup."""
    text = "".join(one if unicodedata.category(one) == "No" else unicodedata.normalize("NFKC", one) for one in text)
    text = _COMMANDS.sub(r"\1", text).replace(r"\%", "%").replace("’", "'").replace("−", "-")
    text = re.sub(r"\\\$|\$|\\!\s*|\\[()\[\],; ]|\\(?:left|right)(?![a-z])|[*`\"“”]", "", text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".,;:!").strip()
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", text)


class _Quantity(NamedTuple):
    value: Decimal
    unit: str

    @property
    def share(self) -> Decimal:
        """The plain number: 0.5 for 50%."""
        return self.value / 100 if self.unit == "%" else self.value

    def written(self) -> list[str]:
        """Return LaTeX for it; math-verify takes the two forms of percent for different things, so both."""
        return [f"{self.value:f}{sign}" for sign in (("%", r"\%") if self.unit == "%" else ("",))]


_MONEY = "[€£¥₹]"
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_QUANTITY = re.compile(
    rf"([-+]?)(?:{_MONEY}|(?:usd|eur|gbp|rs\.?) )? ?(-?)"
    r"(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+)"
    r"(?:e([-+]?\d{1,3})| ?(?:\\times|×|\\cdot) ?10 ?\^ ?\{?(-?\d{1,3})\}?)?"
    rf"(?: ({'|'.join(_SCALES)})\b)?"
    rf"(?: ?({_MONEY}|%|°)| (?!(?:pi|or|and|to|{'|'.join(_SCALES)})\b)([a-z]{{2,}}[a-z ./²³-]*))?"
    r"(?: \([a-z]{3,}[a-z -]*\))?",  # 5 (five)
    re.IGNORECASE,
)


def _quantity(text: str) -> _Quantity | None:
    """Read a number with its unit; None if the text has anything else."""
    found = _QUANTITY.fullmatch(text)
    if found is None:
        return None
    sign, other_sign, digits, exponent, power, scale, mark, words = found.groups()
    value = Decimal(f"{sign}{digits.replace(',', '')}e{exponent or power or 0}") * _SCALES.get((scale or "").lower(), 1)
    unit = {"%": "%", "°": "degree"}.get(mark or "", "") if words is None else words.casefold().rstrip("s. ")
    return _Quantity(-value if other_sign else value, "%" if unit in ("percent", "per cent") else unit)
