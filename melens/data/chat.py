"""How a conversation becomes a prompt, and which part of a reply is the answer.

1. `chat_of` tries what a chat template writes: whether one of its arguments turns thinking on and off, and whether its
   prompt opens a thought. (Names of models or of the template's variables prove nothing.)
2. `check_conversations` refuses a conversation that the template refuses, or of which it drops a message.
3. `read_reply` takes the thoughts out of a reply; a reply that ends inside a thought has no answer.

    chat = chat_of(model.tokenizer, thinking=None, option="benchmark.thinking")
    ids = prompt_ids(model.tokenizer, [{"role": "user", "content": "2 + 2?"}], chat)
    reply = read_reply(decode_reply(model.tokenizer, written), chat.opened)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from melens.errors import MelensError

__all__ = [
    "PLAIN", "Chat", "Message", "Reply", "chat_of", "check_conversations", "decode_reply", "opened_thought",
    "prompt_ids", "prompt_text", "read_reply",
]  # fmt: skip

Message = Mapping[str, Any]
"""A turn of a conversation: `role`, `content`, and any other fields of a dataset."""

_SWITCHES = ("enable_thinking", "thinking", "reasoning")
"""Arguments of chat templates that turn thinking on and off: Qwen3, GLM, Gemma 4 and most others use the first one,
DeepSeek-V3.1 and Granite the second, Command A Reasoning the third."""

_THOUGHTS = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek-R1, GLM, SmolLM3, Nemotron and most others
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    ("to=self<|message|>", "to=user<|message|>"),  # Muse
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    ("Here is my thought process:", "Here is my response:"),  # Granite 3.2
)
"""Where a thought begins and ends, by family."""


@dataclass(frozen=True)
class Chat:
    """How a tokenizer's chat template is used.

    Attributes:
        switch: the template's argument that turns thinking on and off; None where it has none.
        thinking: its value; None where there is no switch.
        opened: the mark of the thought that the prompt itself opens, inside which the reply begins; else empty.
    """

    switch: str | None = None
    thinking: bool | None = None
    opened: str = ""

    @property
    def arguments(self) -> dict[str, bool]:
        """The template's arguments besides the conversation."""
        return {} if self.switch is None or self.thinking is None else {self.switch: self.thinking}

    def in_words(self) -> str:
        """Say whether the model thinks, and what decides it."""
        if self.switch is not None:
            return f"{'on' if self.thinking else 'off'} ({self.switch}={str(self.thinking).lower()})"
        return "on (the chat template opens a thought)" if self.opened else "as the model likes (no switch)"


PLAIN = Chat()
"""For prompts without a chat template."""


@dataclass(frozen=True)
class Reply:
    """A model's reply, split into thoughts and answer.

    Attributes:
        answer: what follows the thoughts; empty where the reply ends inside a thought.
        thoughts: without their marks.
        is_finished: False where the reply ends inside a thought.
    """

    answer: str
    thoughts: str = ""
    is_finished: bool = True


# --- Prompts ----------------------------------------------------------------------------------------------------------

_QUESTION: tuple[Message, ...] = ({"role": "user", "content": "melens asks"},)


def chat_of(tokenizer: Any, thinking: bool | None = None, *, option: str = "thinking") -> Chat:
    """Find out how a tokenizer's chat template turns thinking on and off, from what it writes either way.

    Args:
        tokenizer: with a chat template.
        thinking: whether the model thinks; None turns thinking off if there is a switch, because a small budget of
            tokens would be spent on thoughts.
        option: the name of `thinking` in errors.

    Raises:
        MelensError: the template refuses a single question, has no switch, or marks thoughts in an unknown way.
    """
    if why := _why_not_taken(tokenizer, _QUESTION):
        raise MelensError(f"This model's chat template refuses a single user message ({why}). Use plain text.")
    switch = next((name for name in _SWITCHES if _writes_otherwise(tokenizer, name, True, False)), None)
    if switch is None and thinking is not None:
        has_effort = _writes_otherwise(tokenizer, "reasoning_effort", "low", "high")
        effort = " (its reasoning_effort sets how long the model thinks, not whether)" if has_effort else ""
        raise MelensError(
            f"{option} is {str(thinking).lower()}, but this model's chat template has no switch for thinking{effort}, "
            f"neither {' nor '.join(_SWITCHES)}. Leave {option} at auto."
        )
    taken = None if switch is None else bool(thinking)
    if taken and not any(mark in str(tokenizer.chat_template) for pair in _THOUGHTS for mark in pair):
        raise MelensError(
            f"{option} is true, but melens does not know the marks of this model's thoughts and would read them as "
            f"answers. It knows {', '.join(begin for begin, _ in _THOUGHTS)}. Set {option}=false."
        )
    return Chat(switch, taken, opened_thought(tokenizer, {} if switch is None else {switch: taken}))


def opened_thought(tokenizer: Any, arguments: Mapping[str, Any]) -> str:
    """Return the mark of the thought that a chat template opens in the prompt; empty if it opens none.

    Raises:
        MelensError: the template refuses the arguments.
    """
    try:
        written = _written(tokenizer, _QUESTION, **arguments)
    except _RefusalError as error:
        raise MelensError(f"This model's chat template refuses {dict(arguments)} ({error}).") from error
    behind = written.rpartition(_QUESTION[0]["content"])[2]
    return next((begin for begin, end in _THOUGHTS if behind.rfind(begin) > behind.rfind(end)), "")


def prompt_text(tokenizer: Any, messages: Sequence[Message], chat: Chat) -> str:
    """Write a conversation with the chat template, up to where the model's reply begins.

    Raises:
        MelensError: the template refuses it.
    """
    try:
        return _written(tokenizer, messages, **chat.arguments)
    except _RefusalError as error:
        raise MelensError(f"This model's chat template refuses {_roles(messages)} ({error}).") from error


def prompt_ids(tokenizer: Any, messages: Sequence[Message], chat: Chat) -> list[int]:
    """Return the token ids of `prompt_text`; BOS comes from the template, so the tokenizer adds none."""
    return list(tokenizer(prompt_text(tokenizer, messages, chat), add_special_tokens=False)["input_ids"])


class _RefusalError(Exception):
    """A chat template refuses a conversation."""


def _written(tokenizer: Any, messages: Sequence[Message], *, replied: bool = False, **arguments: Any) -> str:
    arguments |= {"tokenize": False, "add_generation_prompt": not replied}
    try:
        return str(tokenizer.apply_chat_template(list(messages), **arguments))
    except Exception as error:  # templates raise errors of any kind
        raise _RefusalError(" ".join(str(error).split())[:120] or type(error).__name__) from error


def _writes_otherwise(tokenizer: Any, name: str, *values: Any) -> bool:
    """Return whether an argument changes what a template writes; a template ignores or refuses unknown ones."""
    try:
        return len({_written(tokenizer, _QUESTION, **{name: value}) for value in values}) > 1
    except _RefusalError:
        return False


# --- Conversations of a dataset ---------------------------------------------------------------------------------------


def check_conversations(tokenizer: Any, conversations: Iterable[Sequence[Message]], name: str) -> None:
    """Raise a `MelensError` for the first conversation that a chat template refuses, or of which it drops a message.

    One conversation of each sequence of roles is tried. A template without system messages may refuse one, or silently
    drop it.

    Args:
        tokenizer: with a chat template.
        conversations: each with the reply, if it has one.
        name: of the data, for the error.
    """
    tried = set()
    for number, messages in enumerate(conversations, 1):
        kind = tuple((*sorted(message), message["role"], type(message["content"]).__name__) for message in messages)
        if kind in tried:
            continue
        tried.add(kind)
        if why := _why_not_taken(tokenizer, messages):
            begins = " ".join(str(messages[0]["content"]).split())[:40] if messages else ""
            what_to_do = "Let user and assistant take turns in the data, and the user begin."
            if any(message["role"] == "system" for message in messages):
                what_to_do = (
                    "Move the system message's text to the beginning of the first user message, or leave its column "
                    "out of training.columns."
                )
            raise MelensError(
                f"{name}, row {number} of the rows in use, which begins {begins!r}: this model's chat template refuses "
                f"{_roles(messages)} ({why}). {what_to_do}"
            )


def _why_not_taken(tokenizer: Any, messages: Sequence[Message]) -> str:
    marks = [f"melens-{at}-says" for at in range(len(messages))]
    marked = [
        {**message, "content": mark} if isinstance(message["content"], str) else message
        for message, mark in zip(messages, marks, strict=True)
    ]
    try:
        written = _written(tokenizer, marked, replied=bool(messages) and messages[-1]["role"] == "assistant")
    except _RefusalError as error:
        return str(error)
    for message, mark in zip(marked, marks, strict=True):
        if message["content"] == mark and mark not in written:
            return f"it leaves the {message['role']} message out"
    return ""


def _roles(messages: Sequence[Message]) -> str:
    return f"the roles {', '.join(str(message['role']) for message in messages)}"


# --- Replies ----------------------------------------------------------------------------------------------------------


def read_reply(text: str, opened: str = "") -> Reply:
    """Split a reply into thoughts and answer.

    Args:
        text: what a model wrote, as `decode_reply` returns it.
        opened: the mark of the thought inside which the reply begins (`Chat.opened`).
    """
    rest = opened + text
    thoughts: list[str] = []
    for begin, end in _THOUGHTS:
        if begin not in rest and end not in rest:
            continue
        closed = re.compile(re.escape(begin) + "(.*?)" + re.escape(end), re.DOTALL)
        thoughts += closed.findall(rest)
        rest = closed.sub("", rest)
        before, lone_end, after = rest.rpartition(end)  # the thought began in the prompt
        if lone_end:
            thoughts.append(before)
            rest = after
        rest, cut_off, unfinished = rest.partition(begin)
        if cut_off:
            return Reply("", "\n".join([*thoughts, unfinished]).strip(), is_finished=False)
    return Reply(rest.lstrip() if thoughts else text, "\n".join(thoughts).strip())


def decode_reply(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode a reply without special tokens, except those that mark thoughts in some families."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {number: str(token) for number, token in added.items() if token.special}
    marks = {number for number, token in special.items() if any(token in mark for pair in _THOUGHTS for mark in pair)}
    if not marks.intersection(ids):
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    kept = [number for number in ids if number not in special or number in marks]
    return str(tokenizer.decode(kept, skip_special_tokens=False))
