"""Figure 1 and table 8 of a study made by hand: norms of a few prompts, with every metric worked out on paper."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from handmade import emergence_by_hand, study_by_hand, table

import melens
from experiments.emergence import EXPERIMENTS
from melens.analysis.emergence_norms import compare_models, model_in_words
from melens.errors import MelensError

ME_LAYER = 2
BORN = [(2, 0), (2, 0), (2, 3), (-1, 0)]
WRITTEN = [  # by the FFNs to token 0, means 1, 1, 200, 4, 8, 40, 60
    [1.0, 1.0, 100.0, 4.0, 8.0, 60.0, 20.0],
    [1.0, 1.0, 300.0, 4.0, 8.0, 20.0, 100.0],
    [1.0, 1.0, 200.0, 4.0, 8.0, 40.0, 60.0],
    [1.0, 1.0, 200.0, 4.0, 8.0, 40.0, 60.0],
]


def study(written=WRITTEN, me_layer=ME_LAYER, **prompts):
    n = len(written)
    vectors = torch.zeros(n, 7, 1, 6)
    vectors[..., 5] = 1
    vectors[:, 3, 0, 4] = torch.tensor([-900.0, 700.0, 800.0, 800.0][:n])  # |h| is 800 on average
    vectors[:, 2, 0, 1] = 500
    vectors[:, 6, 0, 0] = 50
    norms = [
        table(site="hook_mlp_out", pos=0, norm=written),
        table(site="hook_mlp_out", pos=1, norm=[[9_999.0] * 7] * n),
        table(site="hook_resid_post", pos=0, norm=[[1.0, 2.0, 400.0, 400.0, 400.0, 200.0, 1.0]] * n),
        table(site="hook_resid_post", pos=1, norm=[[1.0] * 7] * n),
    ]
    tables = {
        "norm": pd.concat(norms, ignore_index=True),
        "sink_mass": table(head=0, sink_mass=[[0.6, 0.1, 0.1, 0.5, 0.6, 0.1, 0.1]] * n),
    }
    born = [(me_layer, 0)] * n if me_layer not in (None, ME_LAYER) else BORN[:n]
    return study_by_hand(me_layer, born=born, tables=tables, tensors={"token_vectors": vectors}, **prompts)


@pytest.fixture(scope="module")
def result():
    return melens.analysis.emergence(study(), top_dims=2)


def test_the_last_ffns_are_compared_with_that_of_the_me_layer(result):
    assert result.metrics.ffn_last_blocks == pytest.approx(60 / 200)
    assert result.metrics.ffn_between == pytest.approx(8 / 200)
    assert result.claims.set_index("id").former_verdict["second-massive"] == "holds"


def test_without_blocks_between_there_is_no_second_massive_activation():
    metrics = melens.analysis.emergence(study(me_layer=4)).metrics
    assert (metrics.ffn_last_blocks, metrics.ffn_between) == (None, None)


def test_shares_of_states(result):
    """Of four prompts three have a massive token, two of these on token 0; the intervals are Clopper and Pearson's."""
    metrics = result.metrics
    assert (metrics.n_states, metrics.states_with, metrics.states_agreeing) == (4, 0.75, 0.75)
    assert metrics.states_agreeing_interval == metrics.states_with_interval
    assert metrics.states_with_interval == pytest.approx((0.1941, 0.9937), abs=1e-4)
    assert metrics.share_at_first == metrics.first_massive == metrics.first_alone == pytest.approx(2 / 3)
    assert metrics.first_alone_interval == pytest.approx((0.0943, 0.9916), abs=1e-4)


def test_the_massive_token_is_compared_with_the_others_of_its_prompt(result):
    assert result.metrics.over_others == pytest.approx(400)  # of the two prompts with a massive token 0
    assert result.claims.set_index("id").verdict["over-others"] == "holds in part"  # of two there is no interval


def test_a_magnified_token_may_be_little_larger_than_the_others():
    given = study()
    norms = given.trace.tables["norm"]
    norms.loc[norms["pos"] == 1, "norm"] = 40.0
    judged = melens.analysis.emergence(given).claims.set_index("id")
    assert judged.value["over-others"] == pytest.approx(10)
    assert judged.verdict["magnification"] == "holds"  # × 200 of its own norm


def test_prompts_that_share_their_first_token_are_one_state():
    """Three prompts with a massive first token share it: of two states one agrees, where of four prompts three do."""
    norms = study().trace.tables
    shared = study_by_hand(
        2,
        born=[(2, 0), (2, 0), (2, 0), (-1, 0)],
        first_tokens=[8, 8, 8, 9],
        tables=norms,
        tensors=study().trace.tensors,
    )
    metrics = melens.analysis.emergence(shared).metrics
    assert (metrics.agreement, metrics.states_agreeing, metrics.n_states) == (0.75, 0.5, 2)
    assert metrics.states_with_interval == pytest.approx((0.0126, 0.9874), abs=1e-4)


def test_of_a_massive_token_elsewhere_each_prompt_is_a_state():
    elsewhere = study_by_hand(
        2, born=[(2, 3)] * 4, first_tokens=[8] * 4, tables=study().trace.tables, tensors=study().trace.tensors
    )
    result = melens.analysis.emergence(elsewhere)
    assert (result.metrics.n_states, result.metrics.states_agreeing) == (4, 1)
    assert "trivial" not in dict(result.findings)["agreement"]


def test_one_state_seen_many_times_agrees_trivially():
    one = study_by_hand(
        2, born=[(2, 0)] * 4, first_tokens=[8] * 4, tables=study().trace.tables, tensors=study().trace.tensors
    )
    result = melens.analysis.emergence(one)
    assert result.metrics.n_states == 1
    assert result.metrics.share_at_first_interval is None
    trivial = "prompts agree (trivial: they share their first token, and with it its every state)"
    assert f"4 of 4 {trivial}" in result.figures["emergence"].observed
    assert dict(result.findings)["agreement"].startswith(f"4 of 4 {trivial}")
    assert f"100% of {trivial}" in model_in_words(result.tables["table8"].iloc[0].to_dict())
    verdicts = result.claims.set_index("id").verdict
    assert verdicts[["exists", "first-token"]].eq("holds in part").all()
    assert "36 first tokens are needed" in result.claims.set_index("id").note["first-token"]


def test_the_dims_are_the_largest_anywhere_as_means_of_magnitudes(result):
    dims = result.tables["top_dims"].set_index(["layer", "dim"])["abs_activation"]
    assert (dims[3, 4], dims[2, 1], len(dims)) == (800, 500, 2 * 7)
    assert result.figures["top_dims"].observed == (
        "The largest is dim 4, with |h| = 800 after block 3 (mean over prompts)."
    )


def test_the_verdicts_and_the_row_of_table_8(result):
    verdicts = result.claims.set_index("id").verdict
    assert verdicts[["exists", "single-block", "magnification"]].tolist() == ["holds in part", "holds", "holds"]
    (row,) = result.tables["table8"].to_dict("records")
    assert (row["me_layer"], row["n_layers"], row["sink_onset_layer"], row["n_attending"]) == (2, 7, 3, 7)
    expected = "block 2 of 7, × 200.0 (180.0 to 220.0), one block, 75% of prompts agree, sinks from block 3"
    assert model_in_words(row) == expected
    assert model_in_words(row | {"me_layer": None}) == "no ME layer among 7 blocks"
    assert model_in_words(row | {"sink_onset_layer": None}).endswith("no sinks")


def test_what_a_user_reads(result):
    said = dict(result.findings)
    assert said["ME layer"] == "block 2 (layer 3 counting from 1)"
    assert said["how it emerges"] == "one block: the ME layer alone brings 90% of the peak norm"
    assert said["sinks start"] == "lasting from block 3; a first, passing one in block 0"
    assert said["first tokens"] == "4 distinct"
    assert repr(study()).endswith("block 2 of 7, × 200 (180 to 220), token 0, dim 5")


def test_the_token_that_is_lifted_is_where_most_prompts_of_the_me_layer_have_it():
    assert emergence_by_hand(2, [(2, 3), (2, 3), (2, 1), (1, 0)], first_tokens=[1, 2, 3, 4]).lifted_position == 3


def test_a_slow_climb_is_no_single_block_and_a_few_blocks_are_in_part():
    def verdict(**fields):
        me = emergence_by_hand(ME_LAYER, BORN, first_tokens=[1, 2, 3, 4], **fields)
        return melens.analysis.emergence(replace(study(), me=me)).claims.set_index("id").verdict["single-block"]

    shares = {"share_of_peak": 0.5, "share_of_peak_interval": (0.4, 0.6)}
    assert verdict(**shares, kind="slow climb") == "does not hold"
    assert verdict(**shares, kind="a few blocks") == "holds in part"


@pytest.mark.parametrize(
    ("alone", "massive", "verdict"),
    [
        (36, 36, "holds"),  # 0.903 to 1
        (35, 36, "holds in part"),  # 0.855 to 0.999
        (0, 36, "holds in part"),  # 22 massive tokens, and the first is one
        (0, 18, "holds in part"),
        (0, 17, "does not hold"),
    ],
)
def test_the_massive_token_is_the_first_alone(alone, massive, verdict):
    given = study_by_hand(
        2, n_prompts=36, tables=study().trace.tables, tensors={"token_vectors": torch.ones(36, 7, 1, 6)}
    )
    rows = given.me.per_prompt
    rows["n_massive"] = [1] * alone + [22] * (36 - alone)
    rows["first_is_massive"] = [True] * massive + [False] * (36 - massive)
    result = melens.analysis.emergence(given)
    judged = result.claims.set_index("id").loc["first-token"]
    assert (judged.verdict, judged.value) == (verdict, pytest.approx(alone / 36))
    if verdict != "holds":
        assert "up to 22 massive tokens" in judged.note


def before(*ratios, me_layer=2, **prompts):
    """A study in which token 0's norm is so many times the others' mean of 4, by prompt and block."""
    n = len(ratios)
    norms = [
        table(site="hook_resid_post", pos=0, norm=[[4 * ratio for ratio in of] + [4_000.0] * 5 for of in ratios]),
        table(site="hook_resid_post", pos=1, norm=[[3.0] * 7] * n),
        table(site="hook_resid_post", pos=2, norm=[[5.0] * 7] * n),
        table(site="hook_mlp_out", pos=0, norm=[[4.0] * 7] * n),
    ]
    tables = {"norm": pd.concat(norms, ignore_index=True), "sink_mass": table(head=0, sink_mass=[[0.1] * 7] * n)}
    vectors = {"token_vectors": torch.ones(n, 7, 1, 6)}
    return melens.analysis.emergence(study_by_hand(me_layer, n_prompts=n, tables=tables, tensors=vectors, **prompts))


@pytest.mark.parametrize(
    ("ratios", "factor", "layer", "verdict"),
    [
        ([(1.0, 1.5)] * 3, 1.5, 1, "holds"),
        ([(0.25, 1.5)] * 3, 4, 0, "holds in part"),  # a quarter of the others is four times apart
        ([(8.0, 20.0)] * 3, 20, 1, "does not hold"),
        (
            [(1.0, 1.5), (1.0, 1.5), (2.5, 1.0)],
            5.5 / 3,
            1,
            "holds in part",
        ),  # the mean reaches it, the interval does not
    ],
)
def test_before_the_me_layer_tokens_are_compared_in_the_block_where_they_differ_most(ratios, factor, layer, verdict):
    result = before(*ratios)
    assert (result.metrics.before_ratio, result.metrics.before_layer) == (pytest.approx(factor), layer)
    assert result.claims.set_index("id").verdict["comparable-before"] == verdict


def test_states_before_the_me_layer_count_once():
    assert before((1.0, 3.0), (1.0, 3.0), (1.0, 6.0), first_tokens=[8, 8, 9]).metrics.before_ratio == pytest.approx(4.5)


def test_before_the_first_block_nothing_is_compared():
    judged = before((1.0, 1.0), (1.0, 1.0), me_layer=0).claims.set_index("id").loc["comparable-before"]
    assert (judged.verdict, judged.note) == ("not measured", "No block comes before the ME layer.")


def test_a_prompt_of_one_token_has_no_others_to_compare_with():
    assert before((1.0, 3.0), (1.0, 6.0), n_tokens=[8, 1]).metrics.before_ratio == pytest.approx(3)
    assert before((1.0, 3.0), (1.0, 6.0), n_tokens=[1, 1]).metrics.before_ratio is None


def test_without_an_me_layer_it_says_so():
    result = melens.analysis.emergence(study(me_layer=None))
    assert dict(result.findings)["ME layer"] == "none: Made by hand."
    assert result.claims.set_index("id").verdict["exists"] == "does not hold"
    assert "ffn_last_blocks" not in result.metrics.plain()


def test_where_the_paper_names_a_layer_it_is_said_from_what_it_may_count():
    given, options = study(), {"name": "emergence", "keep": True, "log_scale": True, "top_dims": 2}
    object.__setattr__(given, "cfg", SimpleNamespace(model=SimpleNamespace(paper_me_layer=7)))
    (declared,) = EXPERIMENTS
    found = declared.run(given, declared.options(**options))
    assert found.tables["table8"]["paper_me_layer"].tolist() == [7]
    assert dict(found.findings)["in the paper"].startswith("layer 7. The paper's numbers may count from 1")
    given.cfg.model.paper_me_layer = None
    assert "in the paper" not in dict(declared.run(given, declared.options(**options)).findings)


def test_models_are_drawn_side_by_side(result):
    norms = result.tables["norm_by_block"]
    figure = compare_models({"a": norms, "b": norms}, {"a": 2, "b": None}, ["a", "b"])
    assert [text.text for text in figure.plot.layout.annotations] == ["a", "b"]
    assert [(line.x0, line.name) for line in figure.plot.layout.shapes] == [(2, "ME layer 2")]
    assert figure.observed == "2 runs of 2 models."
    assert melens.analysis.side_by_side({"a": result}).plot.layout.annotations[0].text == "a"
    other = replace(result, experiment="sinks")
    with pytest.raises(MelensError, match="'b' is a result of sinks; side_by_side takes those of emergence"):
        melens.analysis.side_by_side({"a": result, "b": other})
    with pytest.raises(MelensError, match="no results to draw"):
        melens.analysis.side_by_side({})
