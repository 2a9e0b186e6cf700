"""What an analysis starts from: one trace of the prompts, to which a probe is added once."""

import pandas as pd
import pytest
import torch
from handmade import study_by_hand
from planted import VOCABULARY, bridge, gains_apart, plain_model, plant

import melens
from melens import analysis
from melens.analysis import study as studies
from melens.data.prompts import Prompt, TokenizedPrompts

TOKEN, DIM, BLOCK = 7, 21, 1


@pytest.fixture(scope="module")
def model():
    network = gains_apart(plain_model("llama"))
    plant(network, block=BLOCK, token=TOKEN, dim=DIM)
    return bridge(network)


@pytest.fixture(scope="module")
def study(model):
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, VOCABULARY, (4, 12), generator=generator)
    prompts[:, 0] = TOKEN
    return melens.study(model, prompts)


def test_a_study_says_where_the_massive_activation_is_born(study):
    assert study.me.layer == BLOCK
    assert f"block {BLOCK} of {study.n_layers}" in repr(study)
    assert study.massive_prompts == [0, 1, 2, 3]
    assert study.distinct_massive_prompts == [0]  # they share their first token, and with it its every state


def test_the_massive_token_is_that_of_the_formed_state_and_not_that_which_is_massive_first():
    study = study_by_hand(2, n_prompts=3)
    study.me.per_prompt["pos"], study.me.per_prompt["formed_pos"] = [3, 3, 0], [0, 0, 3]
    assert (study.position, study.massive_prompts) == (0, [0, 1])


def test_what_a_study_has_traced_is_not_traced_again(study, monkeypatch):
    def counted(*args, **kwargs):
        calls.append(args[2])
        return traced(*args, **kwargs)

    calls, traced = [], studies.trace
    monkeypatch.setattr(studies, "trace", counted)
    own = study.traced([melens.Norms()])
    assert not calls
    pd.testing.assert_frame_equal(own["norm"], study.trace["norm"])
    another = study.traced([melens.Norms(["ln1.hook_out"]).named("norm_of_ln1")])
    again = study.traced([melens.Norms(["ln1.hook_out"]).named("norm_of_ln1")])
    assert len(calls) == 1
    pd.testing.assert_frame_equal(another["norm_of_ln1"], again["norm_of_ln1"])
    assert set(again.tables) == {*study.trace.tables, "norm_of_ln1"}


def test_a_probe_with_other_settings_is_another(study):
    one, two = (study.traced([melens.SinkByQuery(key)])["sink_by_query"] for key in (0, 1))
    assert not one["attention"].equals(two["attention"])
    assert one["attention"].equals(study.traced([melens.SinkByQuery(0)])["sink_by_query"]["attention"])


def test_tokens_are_made_once(model, monkeypatch):
    made = TokenizedPrompts([Prompt("", id="a"), Prompt("", id="b")], [torch.arange(10, 18), torch.arange(20, 30)])
    monkeypatch.setattr("melens.tracing.trace.choose_prompts", pytest.fail)
    study = melens.study(model, made)
    assert study.trace.prompts["id"].tolist() == ["a", "b"]
    assert [len(ids) for ids in study.tokens] == [8, 10]


_OF_MORE = {
    "benchmark", "dynamics", "generate", "mask_grid", "quantization", "side_by_side", "training", "training_table",
    "trainings", "verdicts", "verification",
}  # fmt: skip
OF_A_STUDY_ALONE = sorted({*analysis.__all__} - _OF_MORE)
"""The others take masks, plans or results, or judge no claim."""

FOR_SHORT_PROMPTS = {"valley": {"rank_tokens": 8}}


@pytest.mark.parametrize("name", OF_A_STUDY_ALONE)
def test_every_analysis_is_had_without_hydra(study, name):
    result = getattr(analysis, name)(study, **FOR_SHORT_PROMPTS.get(name, {}))
    claims = result.claims
    assert set(claims["experiment"]) == {result.experiment}
    assert set(claims[claims["verdict"] != "not measured"]["figure"]) <= set(result.figures)
    assert result.metrics.me_layer == BLOCK
    for figure in result.figures.values():
        assert figure.plot.data
    assert repr(result).startswith(result.experiment)


def test_a_metric_that_does_not_exist_is_an_error(study):
    result = analysis.sinks(study)
    with pytest.raises(AttributeError):
        result.metrics.sink_onset_layr  # noqa: B018
    with pytest.raises(ValueError, match="sink_onset_layr"):
        study.metrics(type(result.metrics), sink_onset_layr=3)
