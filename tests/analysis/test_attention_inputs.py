from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import study_by_hand
from planted import bridge, gains_apart, plain_model

import melens
from melens import MelensError
from melens.analysis import attention_inputs
from melens.analysis.attention_inputs import AttentionInputsMetrics, compare_inputs, inputs_in_words
from melens.analysis.statistics import mean_of_pairs

N, WIDTH = 6, 16
EYE = torch.eye(WIDTH)


def directions(cosine):
    """Unit vectors `[N, WIDTH]` of which every two have this cosine."""
    return cosine**0.5 * EYE[:1] + (1 - cosine) ** 0.5 * EYE[1 : N + 1]


# --- Means over pairs -------------------------------------------------------------------------------------------------


def test_the_mean_of_pairs_leaves_out_the_diagonal_and_what_does_not_count():
    cosines = np.array([[1, 0.1, 0.2, 0.6], [0.1, 1, 0.3, 9], [0.2, 0.3, 1, 9], [0.6, 9, 9, 1]])
    counts = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1]], dtype=bool)
    mean, _ = mean_of_pairs(cosines, counts)
    assert mean == pytest.approx((0.1 + 0.2 + 0.3 + 0.6) / 4)


def test_the_interval_of_pairs_is_the_jackknifes():
    cosines = np.array([[1, 0.1, 0.2], [0.1, 1, 0.6], [0.2, 0.6, 1]])
    mean, (low, high) = mean_of_pairs(cosines, np.ones((3, 3), dtype=bool))
    # without one input the other two's cosine is left: 0.6, 0.2, 0.1; the pseudo-values are 3 · 0.3 - 2 · that
    pseudo_values = np.array([-0.3, 0.5, 0.7])
    reach = 4.302653 * pseudo_values.std(ddof=1) / 3**0.5
    assert (mean, high - mean) == (pytest.approx(0.3), pytest.approx(min(reach, 0.7)))
    assert low == pytest.approx(max(0.3 - reach, -1))


def test_the_interval_of_pairs_covers_the_mean_of_new_inputs():
    """Inputs of one common direction and noise of their own; each input's mean over its pairs covers in about 70%."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        projections = 0.5 + 0.2 * generator.normal(size=10)  # the mean of the product of two is 0.25
        low, high = mean_of_pairs(np.outer(projections, projections), np.ones((10, 10), dtype=bool))[1]
        covered += low <= 0.25 <= high
    assert covered >= 0.9 * 200


def test_fewer_than_three_inputs_have_no_interval_and_one_has_no_pair():
    two, every = np.array([[1, 0.4], [0.4, 1]]), np.ones((2, 2), dtype=bool)
    mean, interval = mean_of_pairs(two, every)
    assert mean == 0.4
    assert np.isnan(interval).all()
    assert np.isnan(mean_of_pairs(two[:1, :1], every[:1, :1])[0])


# --- By hand: 7 blocks, of which the last two count apart; block 2 is the ME layer, blocks 3 and 4 read its state -----


@pytest.fixture
def compared(monkeypatch):
    """Compare inputs whose cosines are these in blocks 3 and 4, and 0.3 in the blocks before."""

    def compare(first=(0.99, 0.97), control=(0.5, 0.6), state=EYE[0], after=EYE[0], tokens=None, quantity=None):
        vectors = {}
        for name in attention_inputs.SITES:
            for layer in range(7):
                cosines = (first[layer - 3], control[layer - 3]) if layer in (3, 4) else (0.3, 0.3)
                of_tokens = torch.stack([directions(cosine) for cosine in cosines], dim=1)  # [prompt, token, d]
                if name == "input" and after is not None:
                    of_tokens[:, 0] = after[layer] if after.ndim > 1 else after
                if quantity in (None, name) or name == "input":
                    vectors[f"{name} {layer}"] = of_tokens[:, None]

        def trace(model, tokens, probes, **options):
            of_prompts = {name: vector[: len(tokens)].clone() for name, vector in vectors.items()}
            for row, ids in enumerate(tokens):
                if len(ids) <= attention_inputs.CONTROL:
                    for vector in of_prompts.values():
                        vector[row, :, 1] = float("nan")
            return melens.Trace({"n_layers": 7}, pd.DataFrame(), {}, of_prompts)

        monkeypatch.setattr(attention_inputs, "trace", trace)
        states = state.expand(N, 7, WIDTH)[:, :, None]
        study = study_by_hand(2, n_prompts=N, tensors={"token_vectors": states})
        tokens = tokens or [[10 + row, 1, 2, 3, 20 + row, 5] for row in range(N)]
        study = replace(study, tokens=[torch.tensor(ids) for ids in tokens])
        fields, by_block = compare_inputs(study)
        return AttentionInputsMetrics(**study.shared_metrics, **fields), by_block

    return compare


def test_cosines_are_of_the_block_where_token_0s_is_smallest(compared):
    metrics, by_block = compared()
    assert metrics.key_cosine == pytest.approx(0.97)
    assert metrics.key_cosine_interval == pytest.approx((0.97, 0.97))
    assert metrics.key_cosine_others == pytest.approx(0.6)
    assert metrics.key_cosine_before == pytest.approx(0.3)
    assert metrics.compared_inputs == N
    assert len(by_block) == 3 * 7 * 2


def test_the_control_compares_prompts_with_different_tokens_there(compared):
    same, other = [10, 1, 2, 3, 7], [10, 1, 2, 3, 8, 9]
    tokens = [same, *[[11 + row, *other[1:]] for row in range(N - 2)], [30, 1, 2]]  # one is too short
    metrics, _ = compared(tokens=tokens)
    assert metrics.key_cosine_others == pytest.approx(0.6)  # of the first prompt with four others
    metrics, by_block = compared(tokens=[[10 + row, 1, 2, 3, 4] for row in range(N)])
    assert metrics.key_cosine_others is None
    assert set(by_block["token"]) == {0}


@pytest.mark.parametrize(
    ("first", "control", "expected"),
    [
        (0.99, 0.5, "holds"),
        (0.99, 0.979, "holds"),  # 0.01 is less than half of 0.021
        (0.99, 0.981, "holds in part"),  # others are as good as alike, as by a bias of the keys
        (0.9, 0.5, "holds in part"),
        (0.7, 0.5, "does not hold"),
        (0.97, 0.99, "holds in part"),
    ],
)
def test_what_is_the_same_for_every_input_must_be_so_beyond_other_tokens(compared, first, control, expected):
    metrics, _ = compared((first, 1.0), (control, 0.2), after=None)
    verdicts = judged(metrics).verdict
    assert {name: verdicts[name] for name in ("input-same", "key-same", "query-same")} == dict.fromkeys(
        ("input-same", "key-same", "query-same"), expected
    )


def judged(metrics):
    return melens.judge({"experiment": "sinks", "model": {"name": "m"}, "metrics": metrics.plain()}).set_index("id")


def test_two_inputs_show_it_in_part_and_one_first_token_shows_nothing(compared):
    metrics, _ = compared()
    two = metrics.model_copy(update={"key_cosine_interval": (float("nan"),) * 2})
    assert judged(two).verdict["key-same"] == "holds in part"
    shared = metrics.model_copy(update={"distinct_first_tokens": 1})
    assert judged(shared).verdict["key-same"] == "trivial here"


def test_one_state_alone_is_compared_with_nothing(compared):
    compared()
    told = {"tensors": {"token_vectors": EYE[0].expand(N, 7, 1, WIDTH)}}
    for born, first_tokens, expected in (
        ([(2, 0)] * N, [10] * N, "trivial here"),
        ([(2, 0)] + [(4, 0)] * (N - 1), range(10, 10 + N), "not measured"),
    ):
        study = study_by_hand(2, born=born, first_tokens=first_tokens, **told)
        fields, by_block = compare_inputs(study)
        metrics = AttentionInputsMetrics(**study.shared_metrics, **fields)
        assert judged(metrics).verdict["key-same"] == expected
        assert len(by_block)
        assert inputs_in_words(metrics)[0][1].startswith("There is one first token alone, and no other input")


def test_a_quantity_that_the_model_does_not_have_is_not_measured(compared):
    metrics, _ = compared(quantity="key")
    verdicts = judged(metrics).verdict
    assert (verdicts["key-same"], verdicts["query-same"]) == ("holds", "not measured")


LARGE = torch.tensor([3.0, 1.0] + [0.0] * (WIDTH - 2))


@pytest.mark.parametrize(
    ("gain", "odds", "cosine", "amplifies", "direction"),
    [
        (1.0, 1.0, 1.0, "does not hold", "holds"),  # all dims alike
        (2.0, 4.0, (18 + 1) / (10 * 37) ** 0.5, "holds", "holds"),
        (0.5, 0.25, (4.5 + 1) / (10 * 3.25) ** 0.5, "does not hold", "holds"),
        (0.1, 0.01, (0.9 + 1) / (10 * 1.09) ** 0.5, "does not hold", "does not hold"),
        (0.3, 0.09, (2.7 + 1) / (10 * 1.81) ** 0.5, "does not hold", "holds in part"),
    ],
)
def test_what_a_norm_does_to_the_massive_dim_by_hand(compared, gain, odds, cosine, amplifies, direction):
    """Of a state (3, 1) the norm multiplies the first dim by its gain."""
    metrics, _ = compared(state=LARGE, after=LARGE * torch.tensor([gain] + [1.0] * (WIDTH - 1)))
    assert metrics.norm_odds == pytest.approx(odds)
    assert metrics.norm_cosine == pytest.approx(cosine)
    verdicts = judged(metrics).verdict
    assert (verdicts["norm-amplifies"], verdicts["norm-direction"]) == (amplifies, direction)


@pytest.mark.parametrize(
    ("others", "expected"), [(0.0, "holds"), (0.2, "holds"), (0.5, "holds in part"), (0.9, "does not hold")]
)
def test_a_massive_state_lies_in_its_largest_dims(compared, others, expected):
    metrics, _ = compared(state=EYE[3] + others * (EYE[7] + EYE[9]))
    assert metrics.few_dims_energy == pytest.approx(1 / (1 + 2 * others**2))  # 1% of 16 dims is one
    assert judged(metrics).verdict["few-dims"] == expected
    assert "mostly is so by definition" in judged(metrics).note["few-dims"]


def test_each_block_reads_the_state_of_the_block_before_and_the_worst_counts(compared):
    states = EYE[:7].clone()  # that of block 2 lies in dim 2, that of block 3 in dims 3 and 8
    states[3, 8] = 1
    after = torch.zeros(7, WIDTH)
    after[3, 2] = after[4, 3] = 1
    metrics, _ = compared(state=states, after=after)
    assert metrics.norm_cosine == pytest.approx(0.5**0.5)
    assert metrics.few_dims_energy == pytest.approx(0.5)


def test_without_blocks_that_read_the_massive_state_nothing_is_measured(compared, monkeypatch):
    compared()
    study = study_by_hand(4, n_prompts=N, tensors={"token_vectors": EYE[0].expand(N, 7, 1, WIDTH)})
    fields, _ = compare_inputs(study)
    assert set(fields) == {"compared_inputs", "inputs_why_not"}


def test_a_state_that_is_formed_later_is_followed_from_there(compared):
    """The state is formed in block 3: of the blocks 3 and 4 the last alone reads it."""
    compared((0.9, 0.97))
    study = study_by_hand(2, n_prompts=N, formed=3, tensors={"token_vectors": EYE[0].expand(N, 7, 1, WIDTH)})
    assert compare_inputs(study)[0]["key_cosine"] == pytest.approx(0.97)


def test_the_words_say_cosines_and_the_control(compared):
    metrics, _ = compared()
    assert "key 0.9700 (0.9700 to 0.9700) (token 4: 0.60)" in dict(inputs_in_words(metrics))["between inputs"]


# --- On a model -------------------------------------------------------------------------------------------------------


def test_vectors_are_those_of_the_whole_prompt():
    model = bridge(gains_apart(plain_model("phi3")))  # which projects queries, keys and values at once
    prompts = [torch.tensor([7 + row, *range(20 + row, 30 + row)]) for row in range(3)]
    study = replace(study_by_hand(2, n_prompts=3), model=model, tokens=prompts)
    vectors = attention_inputs._vectors(study, [0, 2])
    with torch.no_grad():
        _, cache = model.run_with_cache(prompts[2][None])
    for (name, layer), of_tokens in vectors.items():
        expected = cache[f"blocks.{layer}.{attention_inputs.SITES[name]}"][0, [0, 4]].flatten(1)
        torch.testing.assert_close(of_tokens[1], expected, rtol=1e-4, atol=1e-4)
    assert len(vectors) == 3 * len(model.blocks)


def test_a_query_is_compared_with_the_key_that_its_head_reads():
    """Of four query heads of two dims the first two read the first key, the others the second."""
    key = torch.tensor([1.0, 0, 0, 1]).expand(3, 2, 4)
    query = torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 0]).expand(3, 2, 8).clone()
    query[:, 1] = -1.0
    cfg, of_block = SimpleNamespace(n_heads=4, d_head=2), {("query", 3): query, ("key", 3): key}
    found = attention_inputs._own_keys(cfg, of_block, [2, 3])
    assert found == {"own_key_cosine": pytest.approx(3 / 4), "own_key_cosine_others": pytest.approx(-(0.5**0.5))}
    query[:, 1] = float("nan")  # no prompt is long enough
    assert set(attention_inputs._own_keys(cfg, of_block, [3])) == {"own_key_cosine"}
    assert attention_inputs._own_keys(SimpleNamespace(n_heads=2, d_head=2), of_block, [3]) == {}  # it holds a gate


def test_a_key_that_is_no_number_is_an_error(compared, monkeypatch):
    broken = melens.Trace({"n_layers": 7}, pd.DataFrame(), {}, {"key 3": torch.full((2, 1, 2, 16), float("nan"))})
    monkeypatch.setattr(attention_inputs, "trace", lambda *told, **options: broken)
    with pytest.raises(MelensError, match="The key of token 0 in block 3 is no number"):
        compare_inputs(study_by_hand(2))
