"""The paper's claims as statistics with a threshold and a verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from melens.emergence import Emergence
from melens.sinks import SinkOnset

__all__ = ["Claim", "judge_emergence"]

Verdict = Literal["holds", "does not hold", "not testable"]


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, judged on one model.

    Attributes:
        claim: in a sentence.
        source: where the paper makes it.
        statistic: what was measured, None where it could not be.
        criterion: what it must satisfy for the claim to hold.
        verdict: whether it does.
    """

    claim: str
    source: str
    statistic: float | None
    criterion: str
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge_emergence(me: Emergence, onset: SinkOnset) -> list[Claim]:
    """Judge what section 3, section 6 and appendix D say of the place where massive activations are born."""
    here = me.layer is not None
    at_first = bool(me.positions) and me.positions[0] == 0
    return [
        Claim(
            "Massive activations exist",
            "section 1, figure 1",
            me.prompts_with,
            f"share of prompts with one >= {me.criterion.min_prompts:g}",
            _verdict(True, here),
        ),
        Claim(
            "They are born in a single block",
            "section 3, figure 1",
            me.share_of_peak,
            f"that block brings >= {me.criterion.one_block:g} of the peak norm",
            _verdict(here, me.kind == "one block"),
        ),
        Claim(
            "It is the same block for every input",
            "appendix D, figure 10",
            me.agreement if here else None,
            "share of prompts that agree >= 0.95",
            _verdict(here, me.agreement >= 0.95),
        ),
        Claim(
            "The massive token is the first one",
            "section 3.1",
            float(me.positions[0]) if here else None,
            "most frequent position == 0",
            _verdict(here, at_first),
        ),
        Claim(
            "The attention sink starts in the block after it",
            "section 6, figure 7",
            None if not here or onset.layer is None else float(onset.layer - (me.layer or 0)),
            "sink onset - ME layer == 1",
            _verdict(here, here and onset.layer is not None and onset.layer - (me.layer or 0) == 1),
        ),
    ]


def _verdict(testable: bool, holds: bool) -> Verdict:
    return ("holds" if holds else "does not hold") if testable else "not testable"
