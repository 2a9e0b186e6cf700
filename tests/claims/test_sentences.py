"""The paper sentence by sentence: each names claims that exist, or a reason."""

import pandas as pd

from melens.claims.paper import CLAIMS, FAMILY_CLAIM
from melens.claims.sentences import sentences


def test_each_sentence_is_judged_or_says_why_not():
    known = {claim.id for claim in (*CLAIMS, FAMILY_CLAIM)}
    for row in sentences().to_dict("records"):
        assert set(row["claims"]) <= known, row["says"]
        assert row["claims"] or row["why_not"], row["says"]


def test_each_claim_of_the_paper_judges_a_sentence():
    judging = {name for ids in sentences()["claims"] for name in ids}
    others = ("follow-up question", "Sun et al.", "Guo et al.", "Sandoval-Segura et al.", "Xiao et al.")
    beyond = {claim.id for claim in CLAIMS if claim.source.startswith(others)}
    assert {claim.id for claim in CLAIMS} - judging <= beyond


def test_a_sentence_has_the_verdicts_of_its_claims():
    claims = pd.DataFrame({"id": ["exists", "magnification"], "verdict": ["holds", "does not hold"]})
    table = sentences(claims).set_index("says")
    assert table.loc["There the massive token grows several hundred times", "verdicts"] == {
        "magnification": "does not hold"
    }
    first = table.iloc[0]
    assert (first["claims"], first["verdicts"]) == (("exists", "single-block"), {"exists": "holds"})
