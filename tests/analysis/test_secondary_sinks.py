"""Secondary sinks on models into which massive tokens are planted, and on tables worked out by hand."""

from dataclasses import replace
from functools import cache

import pandas as pd
import pytest
import torch
from handmade import study_by_hand
from planted import FAMILIES, bridge, gains_apart, other_model, plain_model, plant

import melens
from melens import MelensError
from melens.analysis.metrics import cosine_with_first
from melens.analysis.secondary_tables import Texts, rates_of, sinks_of, states_of, tokens_of, with_attention

TOKEN, BLOCK, DIM = 7, 1, 21


def prompt_with(*positions, n=24, seed=0, token=TOKEN):
    ids = torch.randint(10, 200, (n,), generator=torch.Generator().manual_seed(seed))
    ids[list(positions)] = token
    return ids


@cache
def planted_model(family="llama"):
    """Six blocks with a massive token; of Gemma 3 four, as its layers come in pairs."""
    network = gains_apart(plain_model(family, **{"num_hidden_layers": 6} if family != "gemma3" else {}))
    plant(network, block=BLOCK, token=TOKEN, dim=DIM)
    return bridge(network)


# --- The probe --------------------------------------------------------------------------------------------------------


def test_a_cosine_that_all_tokens_share_is_none_without_what_they_share():
    generator = torch.Generator().manual_seed(0)
    common, own = torch.zeros(64), torch.randn(1, 40, 64, generator=generator)
    common[0] = 100
    weights = torch.full((1, 40), 1 / 39)
    weights[0, 0] = 0
    cosine, centred = cosine_with_first(own + common, weights)
    assert cosine[0, 1:].min() > 0.9
    assert centred[0, 1:].abs().max() < 0.6
    turned = own + common
    turned[0, 0, 5] = turned[0, 7, 5] = 50_000
    cosine, centred = cosine_with_first(turned, weights)
    assert min(cosine[0, 7], centred[0, 7]) > 0.99
    assert cosine[0, 8:].max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cosines_are_those_of_the_definition_in_every_row_and_piece(dtype):
    generator = torch.Generator().manual_seed(1)
    hidden = (torch.randn(2, 9, 5, generator=generator) + 1).to(dtype)
    batch = melens.Batch(torch.zeros(2, 9, dtype=torch.long), lengths=(9, 6), prompts=(0, 1))
    found = melens.CosineWithFirst().reduce(hidden, batch)
    for row, n in enumerate(batch.lengths):
        unit = torch.nn.functional.normalize(hidden[row, :n].double(), dim=-1)
        assert found["cosine"][row, :n].numpy() == pytest.approx((unit @ unit[0]).numpy(), abs=1e-5)
        without = torch.nn.functional.normalize(unit - unit[1:].mean(0), dim=-1)
        assert found["centred_cosine"][row, :n].numpy() == pytest.approx((without @ without[0]).numpy(), abs=1e-5)


def test_a_long_prompt_in_pieces_has_the_cosines_of_a_whole_one(monkeypatch):
    hidden, weights = torch.randn(1, 50, 8), torch.full((1, 50), 1 / 49)
    weights[0, 0] = 0
    whole = cosine_with_first(hidden, weights)
    monkeypatch.setattr("melens.analysis.metrics._CHUNK", 8)
    for one, other in zip(whole, cosine_with_first(hidden, weights), strict=True):
        torch.testing.assert_close(one, other)


# --- Planted ----------------------------------------------------------------------------------------------------------


OF_FAMILIES = [pytest.param(name, marks=[] if name in ("llama", "gemma3") else pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("family", OF_FAMILIES)
def test_the_planted_token_is_found_wherever_it_stands(family):
    model = planted_model(family)
    study = melens.study(model, [prompt_with(0, 5, 9), prompt_with(0, 3, seed=1), prompt_with(4, seed=2)])
    result = melens.analysis.secondary(study)
    sinks, last = result.tables["secondary_sinks"], study.last_before_trailing
    assert sorted(zip(sinks["prompt"], sinks["pos"], strict=True)) == [(0, 5), (0, 9), (1, 3), (2, 4)]
    assert set(sinks["massive_from"]) == {BLOCK}
    assert set(sinks["last_block"]) == {last}
    assert set(sinks["blocks"]) == {last - BLOCK + 1}
    assert sinks["kind"].tolist() == ["token 0 again"] * 3 + ["other"]
    assert sinks["massive_cosine"].isna().tolist() == [False, False, False, True]  # whose token 0 is ordinary
    assert result.metrics.aligned > 0.99
    assert (result.metrics.later, result.metrics.fades) == (0, 0)
    assert result.metrics.by_birth == {str(BLOCK): 4}
    rates = result.tables["secondary_rates"].set_index("kind")
    assert rates.loc["token 0 again", ["n_tokens", "n_sinks", "rate"]].tolist() == [3, 3, 1]
    assert "In 3 of 3 texts".lower() in result.findings[0][1]


def test_attention_on_a_sink_is_that_of_the_pattern():
    model, ids = planted_model(), prompt_with(0, 5)
    study = melens.study(model, [ids])
    sink = melens.analysis.secondary(study).tables["secondary_sinks"].iloc[0]
    blocks = range(BLOCK + 1, study.last_before_trailing + 2)
    _, cache = model.run_with_cache(ids[None], names_filter=lambda name: name.endswith("hook_pattern"))
    of_keys = torch.stack([cache[f"blocks.{layer}.attn.hook_pattern"][0].mean(0) for layer in blocks]).mean(0)
    assert sink["importance"] == pytest.approx(float(of_keys[5:, 5].mean()), abs=1e-4)
    assert sink["importance_of_first"] == pytest.approx(float(of_keys[:, 0].mean()), abs=1e-4)
    assert sink["even_attention"] == pytest.approx(sum(1 / n for n in range(6, 25)) / 19)


def test_runs_of_token_0_do_not_count_and_shared_prefixes_count_once():
    model = planted_model()
    run = prompt_with(0, 1, 2, 5)
    result = melens.analysis.secondary(melens.study(model, [run, torch.cat([run[:8], prompt_with(3, seed=4)])]))
    assert result.metrics.n_in_run == 4
    assert result.metrics.least_run_cosine > 0.9999  # attention averages over equal values
    assert result.tables["secondary_sinks"][["prompt", "pos"]].values.tolist() == [[0, 5], [1, 11]]
    assert result.metrics.n_tokens == 23 - 2 + 24


def test_a_longer_text_and_provoking_texts_are_added_and_what_cannot_be_is_refused():
    model = planted_model()
    study = melens.study(model, [prompt_with(0, 5), prompt_with(0, 3, seed=1)])
    result = melens.analysis.secondary(study, long_tokens=40)
    long = result.tables["secondary_sinks"].query("texts == 'long text'")
    assert long["pos"].tolist() == [24, 27]  # the second prompt behind the first, whose tokens are states of prompt 0
    assert result.metrics.n_texts == 3
    with pytest.raises(
        MelensError, match="long_tokens is 200; it must be 0, for no long text, or from 2 to the model's"
    ):
        melens.analysis.secondary(study, long_tokens=200)
    with pytest.raises(MelensError, match="provoke is true, but this model has no tokenizer"):
        melens.analysis.secondary(study, provoke=True)


def test_a_model_without_massive_activations_is_told_in_a_sentence():
    plain = bridge(plain_model("llama", num_hidden_layers=6))
    result = melens.analysis.secondary(melens.study(plain, [prompt_with(n=40)]))
    assert result.metrics.n_sinks == 0
    assert "None among 39 tokens behind the first of 1 text. No block's output holds" in result.findings[0][1]
    assert list(result.figures) == ["secondary_rates"]
    verdicts = result.claims.set_index("id")["verdict"]
    assert verdicts["secondary-aligned"] == "not measured"
    assert verdicts["secondary-elsewhere"] != "not measured"


@pytest.mark.slow
def test_a_model_without_attention_is_told_in_a_sentence():
    mamba = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "pad_token_id": 0}
    without = melens.load_model("random", model_type="mamba", config=mamba)
    result = melens.analysis.secondary(melens.study(without, [prompt_with()]))
    assert ("attention on them", "Not measured: there is no block with attention.") in result.findings


@pytest.mark.slow
def test_a_learned_sink_is_told():
    model = other_model("gpt_oss")
    result = melens.analysis.secondary(melens.study(model, [prompt_with(n=40)]))
    assert result.metrics.off_tokens > 0.001
    assert "of all attention goes to no token" in dict(result.findings)["attention on them"]


# --- By hand ----------------------------------------------------------------------------------------------------------


def by_hand(sizes, cosines, centred, importance=None, n_tokens=20):
    """A prompt of a study by hand; `sizes` and the cosines by (layer, pos), 0 elsewhere, and 2 where massive: |h|."""
    study = study_by_hand(0, n_prompts=1, n_tokens=[n_tokens])
    places = [(layer, pos) for layer in range(7) for pos in range(n_tokens)]
    rows = pd.DataFrame([(0, layer, "hook_resid_post", pos) for layer, pos in places])
    rows.columns = ["prompt", "layer", "site", "pos"]
    of_cosines = rows.assign(
        cosine=[cosines.get(at, 0.1) for at in places], centred_cosine=[centred.get(at, 0.1) for at in places]
    )
    value = [sizes.get(at, 1.0) for at in places]
    largest = rows.assign(rank=rows["pos"], dim=0, value=value)
    medians = pd.DataFrame({"prompt": 0, "layer": range(7), "site": "hook_resid_post", "abs_median": 0.1})
    paid = rows.assign(
        site="attn.by_key", importance=[(importance or {}).get(at, 0.01) for at in places], share_of_heads=0.0
    )
    tables = {"largest": largest, "abs_median": medians, "cosine_with_first": of_cosines, "importance_by_key": paid}
    trace = replace(study.trace, tables=tables)
    return study, Texts("prompts", study.tokens, trace)


def test_a_token_turns_only_while_token_0_is_massive_and_by_both_cosines():
    sizes = {(layer, 0): 5_000.0 for layer in (1, 2, 3)} | {(2, 6): -4_000.0, (3, 6): 300.0, (5, 9): 9_000.0}
    turned = {(0, 4): 0.95, (1, 4): -0.95, (2, 4): 0.89, (2, 5): 0.95, (2, 6): 0.97, (3, 6): 0.5}
    centred = {(0, 4): 0.95, (1, 4): -0.93, (2, 4): 0.95, (2, 5): 0.2, (2, 6): 0.96}
    study, texts = by_hand(sizes, turned, centred, {(3, 6): 0.3, (4, 6): 0.1, (3, 0): 0.5, (4, 0): 0.7})
    states = states_of(texts, study.me.criterion, study.last_before_trailing)
    flags = states.set_index(["layer", "pos"])[["is_massive", "is_turned", "is_shared"]].to_dict("index")
    assert flags == {
        (1, 4): {"is_massive": False, "is_turned": True, "is_shared": False},
        (2, 5): {"is_massive": False, "is_turned": False, "is_shared": True},
        (2, 6): {"is_massive": True, "is_turned": True, "is_shared": False},
        (3, 6): {"is_massive": True, "is_turned": False, "is_shared": False},
    }  # block 5 counts apart
    tokens = tokens_of([texts], None)
    sinks, by_reader = with_attention(sinks_of(states, tokens), states, [texts], study.layout)
    four, six = (sinks.set_index("pos").loc[pos] for pos in (4, 6))
    assert (four["first_block"], four["last_block"], four["blocks"], four["cosine"]) == (1, 1, 1, 0.95)
    assert pd.isna(four["massive_from"])
    assert (six["massive_from"], six["massive_to"], six["first_from"], six["first_to"]) == (2, 3, 1, 3)
    assert (six["abs_max"], six["massive_cosine"]) == (4_000, pytest.approx((0.97 + 0.5) / 2))
    assert pd.isna(six["importance"])  # 14 queries see it alone
    assert four["importance"] == pytest.approx(0.01)
    assert by_reader["layer"].tolist() == [2]


def test_a_rate_is_the_mean_of_the_texts_and_a_claim_reads_it():
    tokens = pd.DataFrame({"texts": "prompts", "prompt": [0, 0, 0, 0, 1, 1], "pos": [1, 2, 3, 4, 1, 2], "kind": "word"})
    rates = rates_of(tokens, tokens.iloc[[0, 4, 5]])
    assert rates[["n_tokens", "n_texts", "n_sinks", "rate"]].values.tolist() == [[6, 2, 3, (1 / 4 + 1) / 2]]
    assert rates["low"][0] < 0.625 < rates["high"][0]
