r"""Which option a reply chooses: the letter that it states to be the answer, or none where it states none.

1. Markup goes: full-width forms, LaTeX, bold, quotes, tags. A letter alone in marks or brackets becomes `(B)`, and
   `\boxed{B}` becomes `Answer: B`.
2. Each letter is looked at with what stands before and behind it. It is stated in "Answer: B", "the answer must be B",
   "it is B", "B is correct", "I choose B" and "no, B"; but not in a question, a negation or a condition, nor as the
   article of "A dog". Where several are stated together, as in "A or B", none is.
3. The last statement counts. Without one, a letter counts that heads the reply or stands alone on its last line, unless
   it heads a list of the options.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["LETTERS", "chosen_letter", "read_letters"]

LETTERS = "ABCDEFGHIJ"
"""Of the options, in their order."""


def read_letters(replies: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Read the letters that replies choose, as a filter of the harness; where one does not, its word "[invalid]"."""
    return [
        [chosen_letter(reply, doc["choices"]) or "[invalid]" for reply in of_doc]
        for of_doc, doc in zip(replies, docs, strict=True)
    ]


def chosen_letter(reply: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the option that a reply chooses, None where it chooses none or several.

    Args:
        reply: without its thoughts.
        choices: the texts of the options; what is no letter of one of them is no answer.
    """
    texts = dict(zip(LETTERS, map(_plain, choices), strict=False))
    text = _plain(reply)
    stated = []
    for found in _MENTION.finditer(text):
        letter = (found[1] or found[2]).upper()
        if letter in texts and _is_stated(found, text, texts[letter]):
            stated.append(None if _AND_ANOTHER.match(text, found.end()) else letter)
    return stated[-1] if stated else _labelled(text, texts)


# --- Markup -----------------------------------------------------------------------------------------------------------

_COMMANDS = re.compile(r"\\(?:text(?:bf|rm|it|sf)?|math(?:bf|rm|it|sf)?|mbox|operatorname)\s*\{([^{}]*)\}")
_BOXED = re.compile(r"\\f?boxed\s*\{+([^{}]*)\}+|<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
_OPENS, _CLOSES = r"[(\[{<\"'“‘`*「『【]", r"[)\]}>\"'”’`*」』】]"
_ENCLOSED = re.compile(rf"(?<!\w){_OPENS}+\s*([A-Ja-j])\s*{_CLOSES}+(?!\w)")


def _plain(text: str) -> str:
    """Return a text without markup, with a letter that stood alone in some as `(B)`."""
    text = unicodedata.normalize("NFKC", text)
    for _ in range(2):  # one in the other
        text = _COMMANDS.sub(r"\1", text)
    text = re.sub(r"\$|\\[()\[\],; ]", "", text)
    text = _BOXED.sub(lambda found: f"\nAnswer: {found[1] or found[2] or ''}\n", text)
    text = _ENCLOSED.sub(lambda found: f"({found[1].upper()})", text)
    text = re.sub(r"</?\w+>|[*`\"“”]|^[#>\s]+", "", text.replace("’", "'"), flags=re.MULTILINE)
    text = re.sub(r"\bnot (?:option )?\(?[A-J]\)?,? but (?:rather )?", "", text)
    return re.sub(r"[^\S\n]+", " ", text).strip()


# --- Statements -------------------------------------------------------------------------------------------------------

_MENTION = re.compile(r"(?<![\w'])(?:\(([A-J])\)|([A-Ja-j]))(?![\w'])")
_FILLER = (  # without "not", so that "the answer is not A" states nothing, and without "a", so that "is a dog" does not
    r"(?:(?:the|most|only|correct|right|best|final|answer|option|choice|letter|number|is|be|it|that|clearly|surely|"
    r"definitely|probably|likely|simply|just|indeed|therefore|thus|so|actually)\b[\s:,]*){0,6}$"
)
_ANSWER_IS = re.compile(
    r"\b(?:answer|option|choice|solution)\b(?! (?:choices|options))[^.!?\n:=]{0,50}?(?:\b(?:is|be)\b|[:=→-]|\n)[\s:=]*"
    + _FILLER
    + r"|\banswer $",
    re.IGNORECASE,
)
_IT_IS = re.compile(
    r"\b(?:it|this|that)(?:'s| is| (?:must|has to|should|would|will|can only) be)[\s:]*" + _FILLER, re.IGNORECASE
)
_CHOSEN = re.compile(
    r"\b(?:choose|pick|select|(?:go|going) with|opt for|say|think|believe|guess)[\s:]+(?:that |it's )?" + _FILLER,
    re.IGNORECASE,
)
_TURN = re.compile(  # on one line: "Wait" may be the text of an option
    r"(?:^|[^\w'])(?:no|wait|so|therefore|thus|hence|actually|rather|instead|sorry|correction)[ :,.]+" + _FILLER,
    re.IGNORECASE,
)
_IS_RIGHT = re.compile(
    r"\s(?:is|must be|would be|seems(?: to be)?) (?:\w+ ){0,3}?"
    r"(?:correct|right|best|better|answer|appropriate|suitable)\b",
    re.IGNORECASE,
)
_BEGINS = re.compile(  # a letter that is a noun's, as of "Vitamin C is best", is none
    r"(?:^|[.!?;,:\n] ?|\b(?:option|choice|answer|letter|only|so|that|because|think|believe|say|therefore|thus) )$",
    re.IGNORECASE,
)
_ENDS = re.compile(r"\s*(?:$|[.,;!)\]—–(\n])|\s?:|\s-|\s(?:because|since|as|for|due)\b", re.IGNORECASE)
_AND_ANOTHER = re.compile(
    r"\s*(?:[,/&+.]|,? ?\b(?:or|and)\b)\s*(?:(?:maybe|perhaps|also|option) )*"
    r"(?:\([A-J]\)|[A-J](?=[\s.,;)]*(?:$|[\n.,;)]| or | and )))"
)
_NOT_STATED = re.compile(
    r"\b(?:not|cannot|never|nor|neither|doubt|wrong|incorrect|if|whether|unless|suppose|assum(?:e|ing)|either)\b|n't\b",
    re.IGNORECASE,
)


def _is_stated(found: re.Match[str], text: str, own_text: str) -> bool:
    """Tell whether a letter is stated to be the answer where it stands."""
    before, after = text[max(0, found.start() - 200) : found.start()], text[found.end() :]
    clause = re.split(r"[.!?;,\n]", before.rstrip())[-1]
    rest_of_sentence = re.search(r"[.!?\n]", after)
    if _NOT_STATED.search(clause) or (rest_of_sentence is not None and rest_of_sentence[0] == "?"):
        return False
    is_answer = _ANSWER_IS.search(before)
    if found[2] is not None and found[2].islower():  # bare: a letter only where nothing else could stand
        return is_answer is not None and _ENDS.match(after) is not None
    is_right = _IS_RIGHT.match(after)
    if is_right and _BEGINS.search(before):
        return not _NOT_STATED.search(is_right[0])
    if found[1] is None and not any((_ENDS.match(after), _AND_ANOTHER.match(after), _is_followed_by(after, own_text))):
        return False
    return any((is_answer, _IT_IS.search(before), _CHOSEN.search(before), _TURN.search(before)))


def _is_followed_by(after: str, own_text: str) -> bool:
    """Tell whether behind a letter comes its option's own text: "A dog" is option A where that reads "dog"."""
    return bool(own_text) and " ".join(after.split()).casefold().startswith(own_text.rstrip(".").casefold())


# --- Labels -----------------------------------------------------------------------------------------------------------

_LABEL = re.compile(r"^\(?([A-Ja-j])(?:\)|[.:](?!\w)|(?=\s*$))(.*)$|^([A-J]) (.*)$")


def _labelled(text: str, texts: Mapping[str, str]) -> str | None:
    """Return the letter that heads a reply, or is all of its last line."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    labels = [_label(line, texts) for line in lines]
    if not lines:
        return None
    if labels[0] is not None:
        own_text, following = texts[labels[0]], chr(ord(labels[0]) + 1)
        others = re.sub(re.escape(own_text), "", lines[0], count=1, flags=re.IGNORECASE)  # that may be "Vitamin C."
        is_list = following in labels or re.search(rf"(?<![\w']){following}[.):]", others)
        return None if is_list else labels[0]
    alone = re.fullmatch(r"\(?([A-Ja-j])\)?\.?", lines[-1])
    return labels[-1] if alone and len({label for label in labels if label}) == 1 else None


def _label(line: str, texts: Mapping[str, str]) -> str | None:
    found = _LABEL.match(line)
    if found is None:
        return None
    letter = (found[1] or found[3]).upper()
    if letter not in texts or (found[3] and not _is_followed_by(found[4], texts[letter])):
        return None
    return letter
