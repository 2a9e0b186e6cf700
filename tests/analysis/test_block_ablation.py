"""What is left of a massive activation, on runs made by hand: three prompts, ME layer 2 of 7, all on paper."""

import math

import pandas as pd
import pytest
import torch
from handmade import N_LAYERS, study_by_hand, table

import melens
from melens.analysis import block_ablation
from melens.errors import MelensError
from melens.tracing import interventions

MASSIVE = [[10, 10, 100, 200, 400, 50, 50], [20, 20, 200, 400, 800, 100, 100], [15, 15, 150, 300, 600, 75, 75]]
OTHERS = [[1, 1, 1, 2, 5, 5, 5], [1, 1, 3, 6, 15, 5, 5], [1, 1, 2, 4, 10, 5, 5]]  # mean 2, 4, 10 in blocks 2, 3, 4
REACH = 4.302653 * 0.1 / 3**0.5
"""Of Student's interval around three values 0.1 apart."""

LEFT = {
    "2 ffn": [[0.1, 0.2, 0.3, 9, 9], [0.3, 0.4, 0.5, 9, 9], [0.2, 0.3, 0.4, 9, 9]],  # 0.2, 0.4, 0.3; the last two apart
    "2 ln2_identity": [[0.5] * 5, [0.7] * 5, [0.6] * 5],
    "2 ln2_no_gain": [[2] * 5] * 3,
    "2 ln2_no_norm": [[3] * 5] * 3,
    "2 ffn, 2 ln2_identity": [[0.05] * 5] * 3,
    "0 ffn": [[0.5] * 7] * 3,
    "1 ffn": [[0.51] * 6] * 3,
    "3 ffn": [[0.9, 0.7, 1, 1]] * 3,
    "5 ffn": [[0.01] * 2] * 3,  # the last two blocks are no causes
    "1 attention": [[0.25] * 6] * 3,
    "0 ffn, patch 2 with 3": [[0.8] * 7] * 3,  # intact into ablated
    "patch 2 with -3": [[0.6] * 5] * 3,  # ablated into intact
    "patch 0 with 0": [[0.2] * 7] * 3,  # a removed FFN writes nothing
}
"""‖h‖ / ‖h intact‖ [prompt][block from the changed one on] by what is changed; what is not listed changes nothing."""


class RunsByHand(interventions.MassiveTokenRuns):
    def __init__(self, model, tokens, positions, norms):
        self.prompts, self.positions, self.intact = [ids.tolist() for ids in tokens], positions, norms.float()
        self.ffn = torch.arange(1.0, N_LAYERS + 1)[:, None, None].expand(-1, len(norms), 4)
        self.block_evaluations = 0

    def run(self, hooks, start):
        self.block_evaluations += N_LAYERS - start
        left = torch.full_like(self.intact, math.nan)
        left[:, start:] = 1
        if (given := LEFT.get(", ".join(sorted(name for name, _ in hooks)))) is not None:
            left[:, start:] = torch.tensor(given)
        return self.intact * left

    def run_each(self, changes, start):
        return [self.run(hooks, start) for hooks in changes]

    def run_with_ffn(self, hooks, start):
        return self.run(hooks, start), -self.ffn

    def patch_ffn(self, layer, values):
        return (f"patch {layer} with {values.unique().item():.0f}", abs)


def ablate(me_layer=2, **options):
    """Ablate a study whose runs are those of `LEFT`."""
    norms = [table("hook_resid_post", pos, norm=norm) for pos, norm in enumerate((MASSIVE, OTHERS))]
    study = study_by_hand(me_layer, n_prompts=3, tables={"norm": pd.concat(norms)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interventions, "ablation", lambda model, layer, part: [(f"{layer} {part}", abs)])
        patch.setattr(block_ablation, "MassiveTokenRuns", RunsByHand)
        return melens.analysis.ablation(study, **options)


@pytest.fixture(scope="module")
def result():
    return ablate()


def test_what_is_left_is_the_mean_over_prompts_and_blocks_from_the_me_layer_to_the_last_two(result):
    metrics = result.metrics
    assert metrics.ablation_prompts == 3
    assert metrics.left_without_ffn == pytest.approx((0.2 + 0.4 + 0.3) / 3)
    assert metrics.left_without_ffn_interval == pytest.approx((0.3 - REACH, 0.3 + REACH))
    assert metrics.left_without_norm == pytest.approx({"identity": 0.6, "no_gain": 2, "no_norm": 3})
    assert metrics.left_without_norm_intervals["identity"] == pytest.approx((0.6 - REACH, 0.6 + REACH))
    assert metrics.left_without_norm_intervals["no_gain"] == pytest.approx((2, 2))


def test_the_massive_token_is_compared_with_the_mean_of_the_other_tokens_block_by_block(result):
    over_others = result.metrics.over_others_without_norm
    first, second = (100 / 2 + 200 / 4 + 400 / 10) / 3, (200 / 2 + 400 / 4 + 800 / 10) / 3  # intact
    third = (150 / 2 + 300 / 4 + 600 / 10) / 3
    mean = (first + second + third) / 3
    identity = (0.5 * first + 0.7 * second + 0.6 * third) / 3
    assert over_others == pytest.approx({"identity": identity, "no_gain": 2 * mean, "no_norm": 3 * mean})
    reach = 4.302653 * 2 * (second - first) / 2 / 3**0.5
    expected = (2 * mean - reach, 2 * mean + reach)
    assert result.metrics.over_others_without_norm_intervals["no_gain"] == pytest.approx(expected, rel=1e-3)


def test_without_the_ffn_the_token_may_rise_all_the_same_and_fade(result, monkeypatch):
    metrics = result.metrics
    assert metrics.highest_without_ffn == pytest.approx((12 + 40 + 24) / 3)  # 120, 400, 240 over 10, in block 4
    assert (metrics.highest_without_ffn_layer, metrics.end_without_ffn) == (4, 1)
    assert metrics.risen_without_ffn == pytest.approx((120 / 10 + 400 / 20 + 240 / 15) / 3)
    assert result.claims.set_index("id").verdict["ffn-fades"] == "does not hold"
    monkeypatch.setitem(LEFT, "2 ffn", [[1, 0.3, 0.01, 9, 9]] * 3)  # 100, 60, 4; 200, 120, 8; 150, 90, 6
    faded = ablate()
    assert faded.metrics.highest_without_ffn == pytest.approx((50 + 100 + 75) / 3)
    assert (faded.metrics.highest_without_ffn_layer, faded.metrics.end_without_ffn) == (2, pytest.approx(0.04))
    assert faded.claims.set_index("id").verdict["ffn-fades"] == "holds"  # 75 ± 62 is over 10


def test_causes_are_the_blocks_without_which_half_is_left(result):
    assert result.metrics.causal_layers == [0, 2]  # 0.5 and 0.3; not 0.51, nor 0.01 in the last two
    assert result.metrics.strongest_cause == 2
    left = result.metrics.left_by_cause
    assert left["ffn"] == pytest.approx({0: 0.5, 1: 0.51, 2: 0.3, 3: 0.8, 4: 1})  # of block 3: from block 3 on
    assert left["attention"] == pytest.approx({0: 1, 1: 0.25, 2: 1, 3: 1, 4: 1})
    assert left["ln2_no_gain"] == pytest.approx({0: 1, 1: 1, 2: 2, 3: 1, 4: 1})
    assert "without the FFN of one block: 0 (50% left), 2 (30% left); least" in result.figures["causes"].observed
    assert result.claims.set_index("id").verdict.to_dict() == {
        "ffn-needed": "holds in part", "ffn-fades": "does not hold", "norm-scales": "does not hold",
        "only-me-causal": "does not hold",
    }  # fmt: skip


def test_a_block_before_the_me_layer_can_be_the_strongest_cause(monkeypatch):
    monkeypatch.setitem(LEFT, "1 ffn", [[0.1] * 6] * 3)
    metrics = ablate().metrics
    assert (metrics.causal_layers, metrics.strongest_cause) == ([0, 1, 2], 1)


def test_every_run_begins_at_the_block_that_it_changes(result):
    metrics = result.metrics
    assert metrics.block_evaluations == 3 * (7 + 6 + 5 + 4 + 3 + 2 + 1)
    assert metrics.block_evaluations_from_the_start == 3 * 7 * 7


def test_the_norm_is_crossed_with_the_ffn(result):
    factorial = result.tables["factorial"].set_index(["norm", "ffn"])
    assert factorial["mean"].to_dict() == pytest.approx(
        {
            ("intact", "intact"): 1,
            ("norm → identity", "intact"): 0.6,
            ("norm without its gain", "intact"): 2,
            ("gain without the norm", "intact"): 3,
            ("intact", "removed"): 0.3,
            ("norm → identity", "removed"): 0.05,
            ("norm without its gain", "removed"): 1,
            ("gain without the norm", "removed"): 1,
        }
    )
    assert factorial.norm_at_me_layer["intact", "intact"] == pytest.approx((100 + 200 + 150) / 3)
    identity = (0.5 * 100 + 0.7 * 200 + 0.6 * 150) / 3
    assert factorial.norm_at_me_layer["norm → identity", "intact"] == pytest.approx(identity)


def test_an_intact_output_restores_and_an_ablated_one_carries_the_damage(result):
    left = result.tables["patching"].set_index(["direction", "removed", "patched"])["mean"]
    assert sorted(left["restored"].index) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    assert left["restored", 0, 2] == pytest.approx(0.8)
    assert left["carried", 0, 2] == pytest.approx(0.6)
    assert left["carried", 0, 0] == pytest.approx(0.2)
    assert left["restored", 1, 2] == 1
    assert result.figures["patching"].observed == (
        "The intact FFN output of block 2 alone restores at least 80% of the norm, whichever earlier block's FFN is "
        "removed (blocks 0 and 1; least for block 0)."
    )
    assert [what for what, _ in result.findings] == ["without the FFN", "without the norm", "other blocks", "patching"]
    assert all(said in result.figures["removed"].observed for _, said in result.findings[:2])


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([0, 2], "restores 80% (70% to 90%) of the norm where the FFN of block 0 is removed, the only one before it."),
        ([2], "No FFN lies before block 2, so that its intact output has nothing to restore but itself."),
    ],
)
def test_what_is_restored_says_what_was_tried(blocks, expected):
    rows = [("restored", removed, 2, 1 if removed == 2 else 0.8, 0.7, 0.9) for removed in blocks]
    patching = pd.DataFrame(rows, columns=["direction", "removed", "patched", "mean", "low", "high"])
    assert block_ablation._restored_in_words(patching, 2).endswith(expected)


def test_norms_by_block_change_from_the_me_layer_on(result):
    by_block = result.tables["removed_by_block"].set_index(["removed", "layer"])["mean"]
    assert by_block["intact"].tolist() == [15, 15, 150, 300, 600, 75, 75]
    assert by_block["FFN removed"][:3].tolist() == pytest.approx([15, 15, (0.1 * 100 + 0.3 * 200 + 0.2 * 150) / 3])


@pytest.mark.parametrize(
    ("born", "first_tokens", "max_position", "kept"),
    [
        ([(2, 0), (2, 0), (2, 0)], [7, 7, 8], 64, [0, 2]),  # prompts that share a massive first token are one
        ([(2, 3), (2, 3), (2, 1)], [7, 7, 8], 64, [0, 1, 2]),  # elsewhere their states differ
        ([(2, 3), (2, 3), (2, 1)], [7, 7, 8], 3, [2]),
        ([(2, 0), (-1, 0), (1, 0)], [6, 7, 8], 64, [0]),  # born in the ME layer
    ],
)
def test_which_prompts_are_run(born, first_tokens, max_position, kept, monkeypatch):
    monkeypatch.setattr(block_ablation, "MassiveTokenRuns", RunsByHand)
    norms = [table("hook_resid_post", pos, norm=[[pos + 1.0] * N_LAYERS] * 3) for pos in range(4)]
    study = study_by_hand(2, born=born, first_tokens=first_tokens, tables={"norm": pd.concat(norms)})
    runs = block_ablation._runs(study, max_position).runs
    assert [study.tokens[prompt].tolist() for prompt in kept] == runs.prompts
    assert runs.positions == [born[prompt][1] for prompt in kept]
    assert runs.intact[:, 0].tolist() == [born[prompt][1] + 1 for prompt in kept]  # the massive token's norm


def test_where_there_is_nothing_to_remove_the_error_says_what_to_do():
    with pytest.raises(MelensError, match=r"at position 0 or later: raise exp\.max_position"):
        ablate(max_position=0)
    with pytest.raises(MelensError, match="no massive activation whose causes could be removed"):
        ablate(None)
