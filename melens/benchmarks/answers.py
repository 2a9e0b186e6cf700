r"""Which option a reply chooses: the letter that it states as the answer; None where it states none.

1. `_plain` removes markup: full-width forms, LaTeX, bold, quotes, tags. A letter alone in marks or brackets becomes
   `(B)`, and `\boxed{B}` becomes `Answer: B`.
2. Each letter is judged by the words before and behind it. "Answer: B", "the answer must be B", "it is B", "B is
   correct", "I choose B" and "no, B" state it. A question, a negation or a condition does not, nor does the article of
   "A dog". "A or B" states neither.
3. The last plain statement counts. Without one, the letter counts that begins the reply or stands alone on its last
   line, unless it begins a list of the options (`_labelled`). Without that, the last hedged statement counts: under a
   condition ("if it were wet, it would be A"), of somebody else ("many people think it's A"), or in passing ("the
   hottest is B. Venus").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

__all__ = ["LETTERS", "chosen_letter", "read_letters"]

LETTERS = "ABCDEFGHIJ"
"""Letters of the options, in their order."""


def read_letters(replies: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Read the letters that replies choose, as a filter of the harness; "[invalid]", its own word, where none is."""
    return [
        [chosen_letter(reply, doc["choices"]) or "[invalid]" for reply in of_doc]
        for of_doc, doc in zip(replies, docs, strict=True)
    ]


def chosen_letter(reply: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the option that a reply chooses; None where it chooses none or several.

    Args:
        reply: without its thoughts.
        choices: the texts of the options; other letters than theirs are no answer.
    """
    texts = dict(zip(LETTERS, map(_plain, choices), strict=False))
    text = _plain(reply)
    plain: list[str | None] = []
    hedged: list[str | None] = []
    for found in _MENTION.finditer(text):
        letter = (found[1] or found[2]).upper()
        if letter not in texts or _is_denied(found, text):
            continue
        is_stated = _is_stated(found, text, texts[letter])
        if is_stated or _is_named(found, text, texts[letter]):
            of_its_kind = plain if is_stated and not _is_hedged(found, text) else hedged
            of_its_kind.append(None if _AND_ANOTHER.match(text, found.end()) else letter)
    if plain:
        return plain[-1]
    return _labelled(text, texts) or (hedged[-1] if hedged else None)


# --- Markup -----------------------------------------------------------------------------------------------------------

_COMMANDS = re.compile(r"\\(?:text(?:bf|rm|it|sf)?|math(?:bf|rm|it|sf)?|mbox|operatorname)\s*\{([^{}]*)\}")
_BOXED = re.compile(r"\\f?boxed\s*\{+([^{}]*)\}+|<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
_OPENS, _CLOSES = r"[(\[{<\"'“‘`*「『【]", r"[)\]}>\"'”’`*」』】]"
_ENCLOSED = re.compile(rf"(?<!\w){_OPENS}+\s*([A-Ja-j])\s*{_CLOSES}+(?!\w)")


def _plain(text: str) -> str:
    """Return a text without markup, with a letter that stood alone in some as `(B)`."""
    text = unicodedata.normalize("NFKC", text)
    for _ in range(2):  # commands may be nested
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
    r"(?:\b(?:answer|ans|option|choice|letter|solution)\b(?! (?:choices|options))|答案)"
    r"(?:[^.!?\n:=]{0,50}?\b(?:is|be)\b"
    # "The answer is B" has no full stop where its line ends: what the next one says of A is another sentence.
    r"|(?:(?!\b(?:is|be)\W{1,3}(?-i:[A-HJ])\b)[^.!?\n:=]){0,50}?[:=→-]"
    r"|(?:(?!\b(?:is|be|(?-i:[A-HJ]))\b)[^.!?\n:=]){0,50}?\n)[\s:=]*" + _FILLER + r"|\banswer $",
    re.IGNORECASE,
)
_IT_IS = re.compile(
    r"\b(?:it|this|that)(?:'s| is| (?:must|has to|should|would|will|can only) be)[\s:]*" + _FILLER, re.IGNORECASE
)
_CHOSEN = re.compile(
    r"\b(?:choose|pick|select|(?:go|going) with|opt for|say|think|believe|guess|(?:that|this) leaves(?: us with)?)"
    r"[\s:]+(?:that |it's )?" + _FILLER,
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
_BEGINS = re.compile(  # a letter that belongs to a noun, as in "Vitamin C is best", is no answer
    r"(?:^|[.!?;,:\n] ?|\b(?:option|choice|answer|letter|only|so|that|because|think|believe|say|therefore|thus) )$",
    re.IGNORECASE,
)
_ENDS = re.compile(
    r"\s*(?:$|[.,;!)\]—–(\n])|\s?:|\s-|\s(?:because|since|as|for|due|rather|instead|(?:and )?not)\b", re.IGNORECASE
)
_AND_ANOTHER = re.compile(
    r"\s*(?:[,/&+.]|,? ?\b(?:or|and)\b)\s*(?:(?:maybe|perhaps|also|option) )*"
    r"(?:\([A-J]\)|[A-J](?=[\s.,;)]*(?:$|[\n.,;)]| or | and )))"
)
_NOT_STATED = re.compile(
    r"\b(?:not|cannot|never|nor|neither|doubt|wrong|incorrect|if|whether|unless|suppose|assum(?:e|ing)|either|"
    r"(?:rather|instead) (?:than|of))\b|n't\b",
    re.IGNORECASE,
)
_HEDGES = re.compile(
    r"\bif\b|\b(?:people|students|others|often|commonly|misconception|tempt(?:ed|ing)|(?:first|I) thought|initially|"
    r"(?:may|might|could) (?:think|say|choose|pick|believe|assume|guess)|at first(?: glance| sight)?)\b",
    re.IGNORECASE,
)
_NAMES = re.compile(r"\b(?:is|are)[\s:]*$")
_WOULD_BE = re.compile(r"\bwould (?:\w+ )?(?:be|have been)\b", re.IGNORECASE)
_CONCLUDES = re.compile(
    r"(?:^|[,;:])\s*(?:hmm,? )?(?:and |but )?(?:no|wait|so|therefore|thus|hence|actually|sorry|correction)\b",
    re.IGNORECASE,
)


def _is_denied(found: re.Match[str], text: str) -> bool:
    """Return whether a letter stands in a question, a negation or a condition."""
    clause = re.split(r"[.!?;,\n]", text[max(0, found.start() - 200) : found.start()].rstrip())[-1]
    end_of_sentence = re.search(r"[.!?\n]", text[found.end() :])
    return _NOT_STATED.search(clause) is not None or (end_of_sentence is not None and end_of_sentence[0] == "?")


def _is_stated(found: re.Match[str], text: str, own_text: str) -> bool:
    """Return whether the words around a letter state it as the answer."""
    before, after = text[max(0, found.start() - 200) : found.start()], text[found.end() :]
    is_answer = _ANSWER_IS.search(before)
    if found[2] is not None and found[2].islower():  # "a" and "i" are words as well
        return is_answer is not None and _ENDS.match(after) is not None
    is_right = _IS_RIGHT.match(after)
    if is_right and _BEGINS.search(before):
        return not _NOT_STATED.search(is_right[0])
    if found[1] is None and not any((_ENDS.match(after), _AND_ANOTHER.match(after), _is_followed_by(after, own_text))):
        return False
    return any((is_answer, _IT_IS.search(before), _CHOSEN.search(before), _TURN.search(before)))


def _is_hedged(found: re.Match[str], text: str) -> bool:
    """Return whether a statement is under a condition or somebody else's: it does not override a plain one."""
    sentence = re.split(r"[.!?\n]", text[max(0, found.start() - 200) : found.start()])[-1]
    # "If we read it again, it asks for the sun, so the answer is B": the condition does not cover the conclusion.
    conclusion = _CONCLUDES.split(sentence)[-1]
    # Up to the next letter only: in "B, as A would be correct if it were wet", the condition is A's.
    after = re.split(r"[.!?;,\n]|\b[A-HJ]\b", text[found.end() :], maxsplit=1)[0]
    if _HEDGES.search(conclusion) or _HEDGES.search(after) or re.match(r"[^.!?;\n]*, but not\b", text[found.end() :]):
        return True
    return conclusion == sentence and _WOULD_BE.search(sentence + " " + after) is not None


def _is_named(found: re.Match[str], text: str, own_text: str) -> bool:
    """Return whether a sentence that states no answer names an option in full: "The hottest is B. Venus"."""
    before, after = text[max(0, found.start() - 200) : found.start()], text[found.end() :]
    is_label = found[1] is not None or after.startswith((".", ")", ":"))
    return is_label and _NAMES.search(before) is not None and _is_followed_by(after.lstrip(".):"), own_text)


def _is_followed_by(after: str, own_text: str) -> bool:
    """Return whether a letter is followed by its option's own text: "A dog" is option A if option A is "dog"."""
    return bool(own_text) and " ".join(after.split()).casefold().startswith(own_text.rstrip(".").casefold())


# --- Labels -----------------------------------------------------------------------------------------------------------

_HEAD = r"^[^\w(•–—-]*(?:(?i:answer|option|choice|letter) ){0,2}"
_LABEL = re.compile(
    _HEAD + r"(?:\(?([A-Ja-j])(?:\)|[.:](?!\w)|(?<=[A-J]) [-–—]+ (?!\(?[A-J]\b)|(?=\s*$))(.*)"
    r"|([A-J])(?: ?[-–—=]+ ?| )(.*))$"
)
_LABEL_BEHIND = re.compile(r"(.*\S) \(([A-J])\)\.?")


def _labelled(text: str, texts: Mapping[str, str]) -> str | None:
    """Return the letter that begins a reply, or that is all of its last line."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if sum(line.startswith(("-", "•")) for line in lines) == 1:  # more are a list
        lines[0] = lines[0].lstrip("-• ")
    labels = [_label(line, texts) for line in lines]
    letters = [label for label in labels if label]
    if not letters:
        return None
    # A reply may repeat the options before it answers: their labels rise one by one from A.
    rising = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(letters, LETTERS, strict=False)))
    options, answers = (letters[:rising], letters[rising:]) if rising > 1 else (list(texts), letters)
    is_alone = re.fullmatch(_HEAD + r"\(?[A-Ja-j]\)?\.?", lines[-1]) is not None
    if is_alone and len(set(answers)) == 1 and answers[0] in options:
        return answers[0]
    if labels[0] is None:
        return None
    following = chr(ord(labels[0]) + 1)
    # An option's own text may be "Vitamin C."
    others = re.sub(re.escape(texts[labels[0]]), "", lines[0], count=1, flags=re.IGNORECASE)
    # "B. Venus" that is explained by "A. is wrong" and "C. is wrong" begins no list.
    is_list = letters[1:2] == [following] or re.search(rf"(?<![\w']){following}[.):]", others)
    return None if is_list else labels[0]


def _label(line: str, texts: Mapping[str, str]) -> str | None:
    behind = _LABEL_BEHIND.fullmatch(line)
    if behind and behind[1].casefold() == texts.get(behind[2], "").casefold():
        return behind[2]
    found = _LABEL.match(line)
    if found is None:
        return None
    letter = (found[1] or found[3]).upper()
    if letter not in texts or (found[3] and not _is_followed_by(found[4], texts[letter])):
        return None
    return letter
