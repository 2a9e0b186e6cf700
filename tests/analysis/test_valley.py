"""The compression valley, against values worked out by hand, singular values, and planted models."""

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import study_by_hand
from planted import FAMILIES, VOCABULARY, bridge, gains_apart, other_model, plain_model, plant
from scipy.stats import spearmanr
from test_massive_state import BLOCK, DIM, N_TOKENS, SOURCE, model_with_sinks, study_of
from transformer_lens.hook_points import HookPoint

import melens
from melens import Criterion, MelensError
from melens.analysis import compression_valley, metrics
from melens.analysis.compression_valley import valley

LOW = [0.8, 0.6, 0.1, 0.1, 0.2, 0.3, 0.9]
"""Entropies by block: half way from 0.1 to 0.9 is 0.5, so that the valley is in blocks 2 to 5."""


# --- Formulas ---------------------------------------------------------------------------------------------------------


def test_the_bound_is_the_entropy_where_the_other_directions_are_alike_and_never_below_it():
    p, n = 0.7, 5
    alike = torch.tensor([p, *[(1 - p) / (n - 1)] * (n - 1)])
    assert metrics.entropy_bound(torch.tensor(p), n) == pytest.approx(float(metrics.matrix_entropy(alike.sqrt())))
    assert metrics.entropy_bound(torch.tensor([1.0, 1 / n, 0.01]), n).tolist() == pytest.approx([0, 1, 1])
    assert metrics.entropy_bound(torch.tensor(1.0), 1) == 0
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 0.3, 1.0, 30.0):
        states = torch.randn(200, 6, 4, generator=generator)
        states[:, 0] *= scale
        energies = torch.linalg.svdvals(states) ** 2
        assert bool((aligned_share(states) <= energies[:, 0] / energies.sum(-1) + 1e-6).all())  # theorem 1
        bound = metrics.entropy_bound(aligned_share(states), 4)
        assert bool((metrics.matrix_entropy(energies.sqrt()) <= bound + 1e-6).all())  # corollary 2


def aligned_share(states):
    """(M + αR) / (M + R), as the paper has it: from the cosines of the other rows to the first."""
    energies = states.square().sum(-1)
    cosines = torch.nn.functional.cosine_similarity(states[:, 1:], states[:, :1], dim=-1)
    return (energies[:, 0] + (energies[:, 1:] * cosines**2).sum(-1)) / energies.sum(-1)


def test_shares_of_token_0_and_entropies_of_a_matrix_by_hand():
    """[[1, 0], [1, 1]]: ΣΣ = 3, of which row 0 has 1; along it lie 1 + 1; σ² are (3 ± √5) / 2."""
    states = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    found = melens.Spectrum().reduce(states, melens.Batch(torch.zeros(1, 2, dtype=torch.long), (2,), (0,)))
    assert found["row_share"].item() == pytest.approx(1 / 3)
    assert found["aligned_share"].item() == pytest.approx(2 / 3)
    p = (3 + 5**0.5) / 6
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)) / np.log(2)
    assert found["matrix_entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert found["matrix_entropy_without_first"].item() == 0  # a single row has one direction


@pytest.mark.parametrize(
    ("entropy", "expected"),
    [
        (LOW, (2, 5)),
        ([0.1, 0.9, 0.9], (0, 0)),
        ([0.9, 0.9, 0.1], (2, 2)),
        ([0.9, 0.4, 0.9, 0.2, 0.1, 0.9], (3, 4)),  # the block before is as low, but apart
        ([0.5, 0.5, 0.5], (0, 2)),
    ],
)
def test_a_valley_is_the_unbroken_run_below_half_way_around_the_least(entropy, expected):
    assert compression_valley._extent(np.array(entropy)) == expected


def test_a_rank_correlation_is_spearmans_and_0_where_nothing_varies():
    first = np.array([[3.0, 1, 2, 2, 9], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
    second = np.array([[1.0, 5, 2, 4, 4], [10, 20, 30, 40, 1000], [7, 7, 7, 7, 7]])
    found = compression_valley._rank_correlations(first, second)
    assert found[0] == pytest.approx(spearmanr(first[0], second[0]).statistic)
    assert found[1:].tolist() == pytest.approx([1, 0])


# --- By hand ----------------------------------------------------------------------------------------------------------


RATES = {"intact": [0, 0, 0, 0.8, 0.6, 0.6, 0], "WeMask": [0, 0, 0, 0.5, 0.5, 0, 0],
         "FFN write removed from token 0": [0, 0, 0, 0, 0.35, 0, 0]}  # fmt: skip


@pytest.fixture
def by_hand(monkeypatch):
    """Run `valley` on entropies by hand of three prompts; token 0 is massive in blocks 2 to 4 of 7."""

    def run(entropy=LOW, without=(0.8, 0.7, 0.6, 0.5, 0.4, 0.5, 0.9), removed=None, rates=RATES, others=(), **made):
        def measure(study, prompts, n_tokens, name, change):
            low = removed if name == compression_valley.REMOVED and removed else entropy
            columns = {"entropy": low, "entropy_without_first": without, "entropy_unit_rows": 0.5, "bound": 0.95}
            columns |= {"row_share": 0.9, "aligned_share": 0.95, "norm": 1 - np.array(low), "norm_others": 1.0}
            columns["sink_rate"] = rates[name]
            own = pd.DataFrame(columns).assign(run=name, layer=range(7))
            return pd.concat([own.assign(prompt=prompt) for prompt in prompts], ignore_index=True)

        tokens = [(prompt, layer, 0) for prompt in range(3) for layer in (2, 3, 4)]
        massive = pd.DataFrame([*tokens, *others], columns=["prompt", "layer", "pos"])
        monkeypatch.setattr(compression_valley, "_measure", measure)
        monkeypatch.setattr(compression_valley, "massive_activations", lambda *told: massive)
        return valley(study_by_hand(**({"n_prompts": 3} | made)), rank_tokens=8)

    return run


def test_depth_place_and_what_is_left_of_a_valley(by_hand):
    result = by_hand(removed=[0.8, 0.6, 0.5, 0.4, 0.3, 0.5, 0.9])
    m = result.metrics
    assert (m.inputs, m.valley_prompts, m.valley_tokens, m.prompts_with_others) == (3, 3, 8, 0)
    assert (m.entropy_before, m.entropy_inside) == pytest.approx((0.7, 0.4 / 3))
    assert m.entropy_ratio == pytest.approx(0.4 / 3 / 0.7)
    assert (m.fall, m.fall_without) == pytest.approx((0.7 - 0.4 / 3, 0.75 - 0.5))
    assert m.fall_left == pytest.approx(0.25 / (0.7 - 0.4 / 3))
    assert (m.valley_begins, m.valley_ends, m.massive_ends) == ({"2": 3}, {"5": 3}, {"4": 3})
    assert (m.begins_at_me, m.ends_with_massive, m.earlier_valley) == (1, 1, [])
    assert m.norm_correlation == pytest.approx(-1)
    read, rate = LOW[:-1], RATES["intact"][1:]  # the rate of the block behind
    assert m.sink_correlation == pytest.approx(spearmanr(read, rate).statistic)
    assert m.lifted_removed == pytest.approx((0.4 - 0.4 / 3) / (0.5 - 0.4 / 3))
    assert m.lifted_masked == pytest.approx(0)
    assert (m.sink_rate_intact, m.sink_rate_removed, m.sink_rate_masked) == pytest.approx((0.7, 0.175, 0.5))
    assert m.sinks_left == pytest.approx(0.25)
    assert m.sinks_stay == "In block 4 it is 0.35 then."
    assert (m.bound_before, m.bound_inside) == pytest.approx((0.95, 0.95))
    assert set(result.figures) == {"valley", "valley_by_run"}
    assert not any("nan" in text.lower() for row in result.findings for text in row)
    of_block = result.tables["valley_by_block"].query("run == 'intact' and quantity == 'entropy' and layer == 4")
    assert of_block["mean"].tolist() == pytest.approx([0.2])


def test_blocks_before_the_valley_that_are_low_too_are_told(by_hand):
    result = by_hand(entropy=[0.8, 0.4, 0.6, 0.1, 0.1, 0.3, 0.9])
    assert (result.metrics.valley_begins, result.metrics.earlier_valley) == ({"3": 3}, [1])
    judged = result.claims.set_index("id").loc["valley-begins"]
    assert judged.verdict == "does not hold"
    assert judged.note == "It begins in block 3 (3 inputs). The entropy is below half way before too, in block 1."


def test_prompts_that_share_their_first_token_count_once(by_hand):
    assert by_hand(first_tokens=[10, 10, 11]).metrics.inputs == 2
    assert by_hand(first_tokens=[10, 10, 11]).metrics.valley_begins == {"2": 2}


def test_prompts_in_which_another_token_is_massive_are_left_out_where_there_are_others(by_hand):
    alone = by_hand(others=[(1, 3, 5)]).metrics
    assert (alone.valley_prompts, alone.prompts_with_others) == (2, 0)
    beyond = by_hand(others=[(1, 3, 8), (1, 6, 5)]).metrics  # behind the cut, and in the last two blocks
    assert beyond.valley_prompts == 3
    none = by_hand(others=[(prompt, 3, 5) for prompt in range(3)])
    assert (none.metrics.valley_prompts, none.metrics.prompts_with_others) == (3, 3)
    assert none.claims.set_index("id").verdict["valley-tokens"] == "not measured"
    assert none.claims.set_index("id").verdict["valley-falls"] == "holds"


def test_no_valley_no_block_before_and_no_me_layer_are_told(by_hand):
    flat = by_hand(entropy=[0.5] * 7, without=[0.5] * 7)
    assert flat.metrics.left_why_not == "The entropy falls by 0.00: there is no valley."
    assert flat.metrics.lifted_why_not == "Token 0's row takes 0.00 from the entropy: no valley is its own."
    verdicts = flat.claims.set_index("id").verdict
    assert verdicts[["valley-falls", "valley-begins", "valley-norm"]].eq("does not hold").all()
    assert verdicts[["valley-tokens", "valley-lifted"]].eq("not measured").all()
    first = by_hand(me_layer=0)
    assert first.metrics.fall_why_not == "No block lies before the ME layer."
    assert first.metrics.lifted_removed is not None
    nowhere = by_hand(me_layer=None)
    assert list(nowhere.figures) == ["valley"]
    assert nowhere.findings[0][1].startswith("There is no ME layer")
    assert set(nowhere.claims.note) == {"The model has no ME layer."}
    elsewhere = by_hand(born=[(2, 3)] * 3)
    assert elsewhere.metrics.removed_why_not == "The massive token is at position 3, not the first."
    assert elsewhere.claims.note.str.startswith("It is measured on token 0; the massive token is at position 3.").all()


def test_a_length_that_no_prompt_has_is_told():
    with pytest.raises(MelensError, match=r"No prompt has 9 tokens, to which they would be cut \(exp.rank_tokens\)."):
        valley(study_by_hand(), rank_tokens=9)


# --- Planted ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    return valley(study_of(model_with_sinks(DIM)), rank_tokens=N_TOKENS)


def test_a_planted_massive_activation_makes_a_valley_of_one_row_with_sinks_that_both_go_with_it(planted):
    m = planted.metrics
    assert (m.me_layer, m.inputs, m.removed_layers) == (BLOCK, 3, [BLOCK])
    assert m.entropy_inside < 1e-3 < 0.2 < m.entropy_before
    assert (m.valley_begins, m.valley_ends) == ({str(BLOCK): 3}, {"5": 3})
    assert m.fall_left < 0  # the other tokens' states spread
    assert m.row_share_inside > 0.999
    assert 0 <= m.bound_inside - m.entropy_inside < 1e-4 < 0.5 < m.bound_before - m.entropy_before
    assert m.norm_left < 0.1
    assert m.entropy_removed > 0.9 * m.entropy_inside_without
    assert (m.sink_rate_intact, m.sink_rate_removed, m.sinks_stay) == (1, 0, None)
    verdicts = planted.claims.set_index("id").verdict
    assert (
        verdicts[["valley-falls", "valley-norm", "valley-sinks", "valley-lifted", "valley-sinks-go"]].eq("holds").all()
    )
    assert verdicts["valley-begins"] == "holds in part"  # 3 of 3 inputs show no 0.8
    assert verdicts["valley-tokens"] == "does not hold"


def test_sinks_that_read_something_else_stay_where_the_valley_goes():
    result = valley(study_of(model_with_sinks(DIM, SOURCE)), rank_tokens=N_TOKENS)
    assert result.metrics.entropy_removed > 100 * result.metrics.entropy_inside
    assert (result.metrics.sink_rate_intact, result.metrics.sink_rate_removed) == (1, 1)
    assert result.metrics.sink_correlation == 0  # all blocks have sinks
    assert result.claims.set_index("id").verdict["valley-sinks-go"] == "does not hold"


@pytest.mark.parametrize(
    "family", [family if family == "gemma3" else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)  # Gemma's FFN write passes a norm before the residual stream
def test_entropies_of_each_run_are_those_of_singular_values(family):
    network = gains_apart(plain_model(family))
    plant(network, block=1, token=7, dim=21)
    model = bridge(network)
    prompts = [torch.tensor([7, *range(10 + at, 21 + at)]) for at in range(2)]
    study = melens.study(model, prompts, criterion=Criterion(trailing_blocks=1))
    table = valley(study, rank_tokens=12).tables["valley_by_prompt"].set_index(["run", "prompt", "layer"])
    removed = [("blocks.1.hook_mlp_out", compression_valley._nothing_to_first)]
    for run, hooks in (("intact", []), ("FFN write removed from token 0", removed)):
        with model.hooks(fwd_hooks=hooks):
            _, cache = model.run_with_cache(prompts[1][None])
        for layer in (0, 1, 2):
            states = cache[f"blocks.{layer}.hook_resid_post"][0].double()
            row = table.loc[run, 1, layer]
            for name, rows in (("entropy", states), ("entropy_without_first", states[1:])):
                share = torch.linalg.svdvals(rows) ** 2
                share = share / share.sum()
                entropy = float(-torch.xlogy(share, share).sum() / np.log(len(rows)))
                assert row[name] == pytest.approx(entropy, rel=1e-3, abs=1e-6)
            assert row["norm"] == pytest.approx(float(states[0].norm()), rel=1e-4)
            assert row["norm_others"] == pytest.approx(float(states[1:].norm(dim=-1).mean()), rel=1e-4)
    assert table.loc["FFN write removed from token 0", 1, 1]["norm"] < 0.1 * table.loc["intact", 1, 1]["norm"]


def test_the_write_is_taken_from_token_0_alone():
    written = torch.arange(12.0).view(2, 3, 2)
    found = compression_valley._nothing_to_first(written, HookPoint())
    assert found[:, 0].eq(0).all()
    assert found[:, 1:].equal(written[:, 1:])


@pytest.mark.parametrize(
    "name", ["gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gptj", "falcon_h1"))]
)
def test_other_architectures_have_entropies_by_block(name):
    study = melens.study(other_model(name), [torch.arange(10, 26), torch.arange(30, 46)])
    result = valley(study, rank_tokens=16)
    assert sorted(result.tables["valley_by_prompt"]["layer"].unique()) == [0, 1, 2]
    assert result.metrics.me_layer is None
    assert "valley" in result.figures


def test_a_mixer_without_attention_has_no_sink_rate():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3}
    model = melens.load_model("random", model_type="mamba", config=sizes)
    result = valley(melens.study(model, [torch.arange(10, 26)]), rank_tokens=16)
    assert "sink_rate" not in result.tables["valley_by_prompt"]
    assert set(result.tables["valley_by_block"]["quantity"]) >= {"entropy", "norm", "bound"}


# --- Claims -----------------------------------------------------------------------------------------------------------

REMOVED = {"norm_left": 0.02, "removed_layers": [11], "sink_rate_intact": 0.9, "sink_rate_removed": 0.05}


def mean(name, value, reach=0.01):
    return {name: value, f"{name}_interval": (value - reach, value + reach)}


@pytest.mark.parametrize(
    ("claim", "metrics", "expected"),
    [
        ("valley-falls", mean("entropy_ratio", 0.4), "holds"),
        ("valley-falls", mean("entropy_ratio", 0.495), "holds in part"),
        ("valley-falls", mean("entropy_ratio", 0.81), "does not hold"),
        ("valley-falls", {"fall_why_not": "No block."}, "not measured"),
        ("valley-begins", mean("begins_at_me", 0.9), "holds"),
        ("valley-begins", mean("begins_at_me", 0.6), "holds in part"),
        ("valley-begins", mean("begins_at_me", 0.4), "does not hold"),
        ("valley-ends", mean("ends_with_massive", 0.82), "holds"),
        ("valley-ends", mean("ends_with_massive", 0.9, 0.2), "holds in part"),
        ("valley-ends", mean("ends_with_massive", 0.1), "does not hold"),
        ("valley-norm", mean("norm_correlation", -0.74), "holds"),
        ("valley-norm", mean("norm_correlation", -0.725), "holds in part"),
        ("valley-norm", mean("norm_correlation", 0.9), "does not hold"),
        ("valley-sinks", mean("sink_correlation", -0.6), "holds"),
        ("valley-sinks", mean("sink_correlation", -0.34), "holds in part"),
        ("valley-sinks", mean("sink_correlation", -0.3), "does not hold"),
        ("valley-sinks", {"sink_correlation_why_not": "No attention."}, "not measured"),
        ("valley-tokens", mean("fall_left", 0.52), "holds"),
        ("valley-tokens", mean("fall_left", 0.3), "holds in part"),
        ("valley-tokens", mean("fall_left", -0.09), "does not hold"),
        ("valley-tokens", mean("fall_left", 0.9) | {"prompts_with_others": 3}, "not measured"),
        ("valley-tokens", {"left_why_not": "No valley."}, "not measured"),
        ("valley-lifted", REMOVED | mean("lifted_removed", 0.9), "holds"),
        ("valley-lifted", REMOVED | mean("lifted_removed", 0.6), "holds in part"),
        ("valley-lifted", REMOVED | mean("lifted_removed", 0.4), "does not hold"),
        ("valley-lifted", REMOVED | mean("lifted_removed", 0.9) | {"norm_left": 0.6}, "not measured"),
        ("valley-lifted", {"removed_why_not": "No FFN."}, "not measured"),
        ("valley-sinks-go", REMOVED | mean("sinks_left", 0.05), "holds"),
        ("valley-sinks-go", REMOVED | mean("sinks_left", 0.3), "holds in part"),
        ("valley-sinks-go", REMOVED | mean("sinks_left", 0.6), "does not hold"),
        ("valley-sinks-go", REMOVED | {"sinks_left_why_not": "No sinks."}, "not measured"),
    ],
)
def test_what_is_said_of_the_valley_is_judged(claim, metrics, expected):
    places = {"valley_begins": {"11": 9}, "valley_ends": {"27": 8, "28": 1}, "massive_ends": {"27": 9}}
    shared = {"me_layer": 11, "n_prompts": 9, "distinct_first_tokens": 9, "last_lasting_layer": 27} | places
    result = {"experiment": "valley", "model": {"name": "m"}, "metrics": shared | metrics}
    assert melens.judge(result).set_index("id").verdict[claim] == expected
