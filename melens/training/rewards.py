"""What GRPO rewards in the answer to a maths problem."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from typing import Any

__all__ = ["reward_answer", "reward_format"]

_ENDS_IN_ANSWER = re.compile(r"(\\boxed\{[^{}]+\}|####\s*\S+|answer is:?\s*\S.*)\s*$", re.IGNORECASE)


def reward_answer(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Give 1 where the answer that math-verify reads in a completion equals the right one, else 0.

    Args:
        completions: texts, or conversations of one message.
        answer: the right answers, numbers or LaTeX.
    """
    from math_verify import parse, verify

    in_main_thread = threading.current_thread() is threading.main_thread()  # where alone its alarm can ring
    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    limits = {"parsing_timeout": 5 if in_main_thread else None}
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        gold = parse(f"${right}$", **limits)
        read = parse(_text(completion), **limits)
        rewards.append(float(verify(gold, read, timeout_seconds=5 if in_main_thread else None)))
    return rewards


def reward_format(completions: Sequence[Any], **_: Any) -> list[float]:
    r"""Give 1 where a completion ends in its answer: `\boxed{72}`, `#### 72` or "the answer is 72"."""
    return [float(_ENDS_IN_ANSWER.search(_text(completion)) is not None) for completion in completions]


def _text(completion: Any) -> str:
    return str(completion if isinstance(completion, str) else completion[-1]["content"])
