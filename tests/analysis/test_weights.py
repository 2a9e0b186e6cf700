from itertools import cycle

import pandas as pd
import pytest
import torch
from handmade import study_by_hand
from planted import FAMILIES, N_LAYERS, bridge, gains_apart, plain_model, plant

import melens
from melens import MelensError
from melens.analysis import weights
from melens.analysis.weights import SCORES, rank_of


@pytest.mark.parametrize(("family", "block"), list(zip(FAMILIES, cycle(range(N_LAYERS)), strict=False)))
def test_a_planted_block_ranks_first_without_a_forward_pass(family, block, monkeypatch):
    network = plain_model(family)
    plant(network, block=block, token=7, dim=21)
    model = bridge(network)
    monkeypatch.setattr(type(model.original_model), "forward", None)
    scores = melens.score_blocks(model)
    assert {score: rank_of(block, scores, score) for score in SCORES} == dict.fromkeys(SCORES, 1)
    assert scores.dim[block] == 21
    assert scores.neuron_index[block] == 0


def test_the_strongest_neuron_by_hand():
    network = gains_apart(plain_model("llama"))
    mlp = network.base_model.layers[1].mlp
    gain = network.base_model.layers[1].post_attention_layernorm.weight
    gate, up, down = mlp.gate_proj.weight * gain, mlp.up_proj.weight * gain, mlp.down_proj.weight
    outputs = 64 * (gate.norm(dim=1) * up.norm(dim=1) + (gate * up).sum(1).abs()) / 2 * down.norm(dim=0)
    scores = melens.score_blocks(bridge(network))
    assert scores.neuron[1] == pytest.approx(outputs.max().item(), rel=1e-4)
    assert scores.neuron_index[1] == int(outputs.argmax())
    assert scores.down_max[1] == pytest.approx(down.abs().max().item())
    assert scores.down_outlierness[1] == pytest.approx((down.abs().max() / down.pow(2).mean().sqrt()).item(), rel=1e-4)


def test_the_response_is_that_of_the_ffn_itself():
    network = plain_model("llama")
    plant(network, block=2, token=7, dim=21)
    scores = melens.score_blocks(bridge(network))
    block = network.base_model.layers[2]
    strongest_input = torch.zeros(1, 64)
    strongest_input[0, 3] = 8  # the planted neuron reads dim 3; the norm of a unit-RMS vector of 64 dims is 8
    with torch.no_grad():
        answer = block.mlp(block.post_attention_layernorm(strongest_input)).norm() / 8
    assert scores.response[2] == pytest.approx(answer.item(), rel=1e-3)


def test_ffns_without_a_gate_are_scored_too():
    config = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50}
    scores = melens.score_blocks(melens.load_model("random", model_type="gpt2", config=config))
    assert len(scores) == 3
    assert scores[list(SCORES)].gt(0).all(axis=None)


@pytest.mark.parametrize("model_type", ["mixtral", "mamba", "opt", "bloom"])
def test_a_model_without_such_an_ffn_gets_a_reason(model_type):
    config = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if model_type == "mixtral":
        config["num_key_value_heads"] = 2
    if model_type == "opt":
        config |= {"ffn_dim": 64, "word_embed_proj_dim": 32}
    model = melens.load_model("random", model_type=model_type, config=config)
    with pytest.raises(MelensError, match="no block can be scored"):
        melens.score_blocks(model)


BY_HAND = pd.DataFrame(
    {
        "layer": range(7),
        "response": [1, 9, 5, 2, 1, 7, 8],
        "neuron": [5, 5, 5, 1, 1, 1, 1],
        "alignment": [1, 2, 3, 4, 5, 6, 7],
        "down_max": [1, 1, 3, 1, 1, 2, 4],
        "down_outlierness": [7, 6, 5, 4, 3, 2, 1],
        "neuron_index": 0,
        "dim": [0, 1, 5, 3, 4, 5, 6],
    }
)


def test_the_me_layer_is_ranked_among_all_blocks_and_without_the_last_two(monkeypatch):
    monkeypatch.setattr(weights, "score_blocks", lambda model: BY_HAND)
    result = melens.analysis.prediction(study_by_hand(2))
    metrics = result.metrics
    assert metrics.ranks == {"response": 4, "neuron": 1, "alignment": 5, "down_max": 2, "down_outlierness": 3}
    assert metrics.ranks_without_last_two == {
        "response": 2, "neuron": 1, "alignment": 3, "down_max": 1, "down_outlierness": 3,
    }  # fmt: skip
    assert metrics.top_layer == {"response": 1, "neuron": 0, "alignment": 6, "down_max": 6, "down_outlierness": 0}
    assert (metrics.predicted_dim, metrics.n_scored) == (5, 7)
    assert "dim 5, the measured massive dim" in result.figures["scores"].observed
    assert result.claims.verdict.tolist() == ["does not hold"]


def test_a_block_without_a_score_has_no_rank(monkeypatch):
    monkeypatch.setattr(weights, "score_blocks", lambda model: BY_HAND[BY_HAND.layer != 2])
    result = melens.analysis.prediction(study_by_hand(2))
    assert result.metrics.ranks == dict.fromkeys(SCORES)
    assert result.metrics.predicted_dim is None
    assert "Block 2, the ME layer, has no FFN whose weights can be scored" in result.figures["scores"].observed
    assert result.claims.note.tolist() == ["The ME layer's FFN has no score."]
