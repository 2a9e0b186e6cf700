"""What other ratios to the median change, on a trace made by hand: which block is massive first is known for each."""

import pandas as pd
import pytest
from handmade import emergence_by_hand, study_by_hand, tiny_model

import melens
from melens.analysis import criterion_ratios, ffn_concentration
from melens.analysis.criterion_ratios import verdicts_by_ratio

FIRSTS = [10, 11, 12]


@pytest.fixture
def judged(monkeypatch):
    """By 500 and 750 block 1 is the ME layer, by more block 2, as in the study; list what was judged again."""
    calls = []

    def find(trace, criterion):
        layer = 1 if criterion.min_ratio < 1_000 else 2
        return emergence_by_hand(layer, [(layer, 0)] * 3, first_tokens=FIRSTS, criterion=criterion)

    def judge(study, judge_all):
        calls.append(study.me.layer)
        verdicts = {1: ["holds", "does not hold"], 2: ["holds", "holds in part"]}[study.me.layer]
        of_claims = {"experiment": ["emergence", "ffn"], "claim": ["A.", "B."], "verdict": verdicts}
        return pd.DataFrame(of_claims, index=pd.Index(["a", "b"], name="id"))

    monkeypatch.setattr(criterion_ratios, "find_me_layer", find)
    monkeypatch.setattr(criterion_ratios, "_judged", judge)
    return calls


def test_what_differs_is_judged_again_and_once(judged):
    by_ratio = verdicts_by_ratio(study_by_hand(2, first_tokens=FIRSTS), (500, 750, 1_000, 2_000))
    assert by_ratio.me_layers == {"500": 1, "750": 1, "1000": 2, "2000": 2}
    assert by_ratio.layers["same"].tolist() == [False, False, True, True]
    assert by_ratio.layers["agreeing"].tolist() == [3, 3, 3, 3]
    assert judged == [2, 1]  # by the study's own criterion, and by 500, which 750 shares
    assert by_ratio.changed == {"500": ["b"], "750": ["b"]}
    rows = by_ratio.verdicts.set_index(["min_ratio", "id"])
    shown = ["me_layer", "verdict", "by_criterion"]
    assert rows.loc[(500, "b"), shown].tolist() == [1, "does not hold", "holds in part"]
    assert rows.loc[(2_000, "b"), ["me_layer", "verdict", "changed"]].tolist() == [2, "holds in part", False]
    assert by_ratio.in_words() == (
        "By how many times the median an activation must be to count as massive, the ME layer is block 1 for 500 and "
        "750, block 2 for 1,000 and 2,000. Of 3 prompts so many have that layer: 3 (500), 3 (750), 3 (1,000) and 3 "
        "(2,000). Of 2 verdicts (emergence, ffn) on the paper's claims these change: for 500 and 750 b to 'does not "
        "hold'."
    )


def test_where_nothing_differs_nothing_is_judged_again(judged):
    by_ratio = verdicts_by_ratio(study_by_hand(2, first_tokens=FIRSTS), (1_000, 2_000))
    assert judged == []
    assert by_ratio.changed == {}
    assert by_ratio.in_words() == (
        "By how many times the median an activation must be to count as massive, the ME layer is block 2 for 1,000 and "
        "2,000. It is the same in every prompt, and so is every verdict on the paper's claims."
    )


def test_a_prompt_that_is_massive_elsewhere_is_a_difference(judged):
    """The ME layer is the same, and the claims are about fewer prompts."""
    study = study_by_hand(2, born=[(2, 0), (2, 0), (1, 0)], first_tokens=FIRSTS)
    by_ratio = verdicts_by_ratio(study, (1_000,))
    assert by_ratio.layers["same"].tolist() == [False]
    assert len(judged) == 2


def test_only_what_the_trace_has_is_judged_again(monkeypatch):
    """Without the probes of the FFN its analysis is left out, and nothing is traced for it."""
    monkeypatch.setattr(criterion_ratios, "OF_THE_TRACE", {"ffn": "ffn", "direction": "direction"})
    model = tiny_model()
    study = melens.study(model, [[10, 11, 12], [20, 11, 12]])
    assert study.has(study.probes[:1])
    assert not study.has([melens.SinkByQuery()])
    judged = criterion_ratios._judged(study, judge_all=False)
    assert set(judged["experiment"]) == {"direction"}
    assert study._traced == {}
    study.traced(ffn_concentration.probes(model))
    assert set(criterion_ratios._judged(study, judge_all=False)["experiment"]) == {"direction", "ffn"}


def test_all_is_judged_again_where_that_is_asked_for():
    judged = criterion_ratios._judged(melens.study(tiny_model(), [[10, 11, 12], [20, 11, 12]]), judge_all=True)
    assert set(judged["experiment"]) == {*criterion_ratios.OF_THE_TRACE, *criterion_ratios.WITH_PASSES}
