"""Which weights carry a planted massive activation: one scalar of six families, one expert of two kinds of mixture."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from planted import FAMILIES, bridge, plain_model, plant
from transformers import AutoConfig, AutoModelForCausalLM

import melens
from melens import Criterion, MelensError
from melens.analysis.massive_texts import massive_texts
from melens.analysis.super_experts import largest_outputs, mark_super
from melens.analysis.super_weights import RANDOM, REST, TOP, SuperWeights, scan, spiking
from melens.models.ffn_weights import experts_of, ffn_weights

BLOCK, SOURCE, DIM, EXPERT, N_TOKENS = 1, 3, 21, 2, 16
FIRST = (7, 8, 6)
QUICK = {"factors": [0, 2], "n_random": 2, "max_tokens": N_TOKENS}
MIXTURES = {"qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32}, "mixtral": {"num_local_experts": 4}}


def study_of(model, first=FIRST):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 200, (N_TOKENS + extra,), generator=generator) for extra in range(3)]
    for number, prompt in enumerate(prompts):
        prompt[0] = first[number % len(first)]
    return melens.study(model, prompts, criterion=Criterion(trailing_blocks=1))


@cache
@torch.no_grad()
def planted(family):
    network = plain_model(family)
    plant(network, block=BLOCK, token=FIRST[0], dim=DIM, source_dim=SOURCE)
    network.get_input_embeddings().weight[list(FIRST), SOURCE] = torch.tensor([10.0, 40.0, 20.0])
    return study_of(bridge(network))


@cache
@torch.no_grad()
def mixture(model_type):
    """A mixture in which one expert of one block writes `DIM` wherever the input is one of `FIRST`."""
    sizes = {
        "vocab_size": 200, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "num_experts_per_tok": 2,
        "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **sizes | MIXTURES[model_type])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    embedding = network.get_input_embeddings().weight
    embedding[:, SOURCE] = 0
    embedding[list(FIRST), SOURCE] = torch.tensor([10.0, 40.0, 20.0])
    for layer in network.base_model.layers:
        layer.self_attn.o_proj.weight[SOURCE] = 0
        layer.mlp.experts.down_proj[:, SOURCE] = 0
    mlp = network.base_model.layers[BLOCK].mlp
    mlp.gate.weight[:, SOURCE] = torch.tensor([4.0 if expert == EXPERT else 0.0 for expert in range(4)])
    mlp.experts.gate_up_proj[EXPERT, [0, 32]] = 0
    mlp.experts.gate_up_proj[EXPERT, [0, 32], SOURCE] = 4
    mlp.experts.down_proj[EXPERT, DIM, 0] = 5_000
    return study_of(bridge(network))


# --- Super weights ----------------------------------------------------------------------------------------------------


@cache
def own_weights(family="llama"):
    study = planted(family)
    table = scan(study)
    blocks = spiking(table, study.last_before_trailing)
    return study, table, SuperWeights(study, massive_texts(study, 3, N_TOKENS), blocks, 1)


@pytest.mark.parametrize(
    "family",
    [name if name in ("phi3", "gemma3") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)  # a joint projection and a norm behind the FFN; the others are built alike
def test_the_planted_scalar_is_found_in_every_family_and_takes_the_massive_activation_with_it(family):
    _, _, weights = own_weights(family)
    (scalar,) = weights.scalars
    assert (scalar.layer, scalar.row, scalar.column) == (BLOCK, DIM, 0)
    assert weights.shares([DIM], [0]).flatten().tolist() == pytest.approx(
        [1, 1, 1]
    )  # `plant` leaves no other weight there
    left = weights.scale(scalar, 0).effects.norms[:, BLOCK] / weights.runs.intact.norms[:, BLOCK]
    assert (left < 0.05).all()
    own = weights.scale(weights.controls(0)[0], 0).effects.norms[:, BLOCK] / weights.runs.intact.norms[:, BLOCK]
    assert own.tolist() == pytest.approx([1, 1, 1], abs=0.1)


def test_what_carries_the_planted_activation_is_told_and_drawn():
    result = melens.analysis.carriers(planted("llama"), **QUICK)
    metrics = result.metrics
    assert (metrics.scalar, metrics.found) == ([BLOCK, DIM, 0], [[BLOCK, DIM, 0]])
    assert (metrics.scalar_agreement, metrics.weight_rank, metrics.texts) == (1, 1, 3)
    assert metrics.left < 0.05
    assert metrics.left_control == pytest.approx(1, abs=0.1)
    assert metrics.left_random == pytest.approx(1, abs=0.1)
    scaling = result.tables["scaling"]
    assert sorted(scaling.factor.unique()) == [0, 1, 2]
    rise = scaling[(scaling.kind == "super weight") & (scaling.factor == 0)].dloss
    assert metrics.dloss == pytest.approx(rise.mean())
    verdicts = result.claims.set_index("id").verdict
    assert verdicts[["one-scalar", "scalar-makes-massive"]].eq("holds").all()
    assert verdicts["super-experts"] == "not measured"
    assert sorted(result.figures) == ["massive_weights", "scalars", "scaling", "scan"]
    assert all("tiny" in figure.plot.layout.title.text for figure in result.figures.values())


def test_the_scan_and_the_products_are_those_of_a_plain_forward_pass():
    study, table, weights = own_weights()
    mlp = study.model.original_model.model.layers[BLOCK].mlp
    seen = {}
    module = mlp.original_component.down_proj
    handle = module.register_forward_hook(lambda module, args, output: seen.update(x=args[0][0], y=output[0]))
    for number, tokens in enumerate(study.tokens):
        with torch.no_grad():
            study.model.original_model(tokens[None])
        row = table[(table.prompt == number) & (table.layer == BLOCK)].iloc[0]
        x, y = seen["x"], seen["y"]
        assert abs(row.input) == pytest.approx(x.abs().max().item(), rel=1e-4)
        assert abs(row.output) == pytest.approx(y.abs().max().item(), rel=1e-4)
        assert (row.column, row.row, row.together) == (int(x[0].abs().argmax()), int(y[0].abs().argmax()), True)
    handle.remove()
    texts = massive_texts(study, 3, N_TOKENS).prompts
    of_last = texts.index(len(study.tokens) - 1)
    down = weights.here.down.T
    shares = weights.shares([DIM, 5], [0, 9])[of_last]
    by_hand = [[float(down[r, c] * x[0, c] / y[0, r]) for c in (0, 9)] for r in (DIM, 5)]
    assert shares.flatten().tolist() == pytest.approx(np.array(by_hand).flatten().tolist(), rel=1e-3, abs=1e-6)
    assert weights.products[of_last].item() == pytest.approx(float(down[DIM, 0] * x[0, 0]), rel=1e-4)


def test_a_scaled_scalar_writes_so_many_times_its_product():
    _, _, weights = own_weights()
    half = weights.scale(weights.scalars[0], 0.5).effects
    intact = weights.runs.intact
    of_texts = intact.states[:, BLOCK, DIM] - 0.5 * weights.products
    torch.testing.assert_close(half.states[:, BLOCK, DIM], of_texts, rtol=1e-4, atol=1e-2)
    assert weights.scale(weights.scalars[0], 1).effects is intact


def test_controls_are_the_largest_other_entry_and_others_drawn_by_the_seed():
    _, _, weights = own_weights()
    controls = weights.controls(3)
    sizes = weights.here.down.abs().clone()
    sizes[0, DIM] = 0
    largest = divmod(int(sizes.argmax()), 64)
    assert (controls[0].column, controls[0].row) == largest
    places = {(control.row, control.column) for control in controls}
    assert len(places) == 4
    assert (DIM, 0) not in places
    assert weights.controls(3) == controls
    assert [control.kind for control in controls] == ["largest other", "random", "random", "random"]


def test_rows_at_zero_leave_what_the_others_write():
    _, _, weights = own_weights()
    runs = {changed.what: changed.effects for changed in weights.zero_rows(1, 1)}
    assert set(runs) == {TOP, REST, RANDOM}
    intact = weights.runs.intact.states[:, BLOCK, DIM]
    torch.testing.assert_close(runs[TOP].states[:, BLOCK, DIM], intact - weights.products, rtol=1e-4, atol=0.1)
    torch.testing.assert_close(
        runs[REST].states[:, BLOCK, DIM], intact, rtol=1e-4, atol=1e-2
    )  # neuron 0 alone writes it
    torch.testing.assert_close(runs[RANDOM].states[:, BLOCK, DIM], intact, rtol=1e-4, atol=1e-2)


def test_blocks_spike_where_input_and_output_are_ten_times_the_median():
    sizes = pd.DataFrame({
        "prompt": 0, "layer": range(6), "input": [1, -1, 20, 20, 1, 90], "output": [1, 1, -30, 5, 1, 90],
        "column": 4, "row": 7, "together": True,
    })  # fmt: skip
    blocks = spiking(sizes, last=4)
    assert blocks[blocks.spikes].layer.tolist() == [2]  # 3 in its input alone, 5 is a trailing block
    apart = sizes.assign(together=False)
    assert not spiking(apart, last=4).spikes.any()


def test_a_change_that_does_not_reach_what_is_run_is_refused(monkeypatch):
    _, _, weights = own_weights()
    elsewhere = ffn_weights(bridge(plain_model("llama")), BLOCK)
    assert weights.products.abs().min() > 1_000
    monkeypatch.setattr(SuperWeights, "here", elsewhere)
    with pytest.raises(MelensError, match="changes by other than w · x"):
        weights._check_effect()


# --- Super experts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MIXTURES)
def test_the_planted_expert_is_found_and_takes_the_massive_activation_with_it(model_type):
    study = mixture(model_type)
    before = {name: weight.detach().clone() for name, weight in study.model.original_model.named_parameters()}
    result = melens.analysis.carriers(study, **QUICK)
    metrics = result.metrics
    assert (metrics.me_layer, metrics.experts, metrics.n_experts) == (BLOCK, [[BLOCK, EXPERT]], 16)
    assert metrics.experts_left < 0.05
    assert metrics.experts_left_random > 0.5
    verdicts = result.claims.set_index("id").verdict
    assert verdicts["super-experts"] == "holds"
    assert verdicts["one-scalar"] == "not measured"
    assert list(result.figures) == ["experts"]
    assert result.figures["experts"].plot is not None
    assert f"expert {EXPERT} of block {BLOCK}" in result.figures["experts"].observed
    now = study.model.original_model.named_parameters()
    assert all(torch.equal(weight, before[name]) for name, weight in now)


def test_an_experts_output_is_that_of_its_own_matrices():
    study = mixture("qwen3_moe")
    texts = massive_texts(study, 3, N_TOKENS)
    outputs = largest_outputs(study, texts).set_index(["layer", "expert"]).largest
    experts = experts_of(study.model, 0)
    inputs = []
    handle = experts.register_forward_pre_hook(lambda module, args: inputs.append(args))
    with torch.no_grad():
        for tokens in texts.tokens:
            study.model.original_model(tokens[None])
    handle.remove()
    hidden = torch.cat([one[0] for one in inputs])
    index = torch.cat([one[1] for one in inputs])
    for expert in range(4):
        own = hidden[(index == expert).any(dim=1)]
        gate, up = (own @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
        written = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T
        assert outputs[0, expert] == pytest.approx(written.abs().max().item(), rel=1e-4)


def test_experts_that_do_not_add_up_are_refused(monkeypatch):
    study = mixture("mixtral")
    experts = experts_of(study.model, 1)
    handle = experts.register_forward_hook(lambda module, args, output: 1.5 * output)
    with pytest.raises(MelensError, match="experts of block 1, called one by one, do not add up"):
        largest_outputs(study, massive_texts(study, 3, N_TOKENS))
    handle.remove()


def test_an_expert_is_super_over_both_bounds_and_up_to_where_the_state_is_formed():
    values = [1.0] * 400
    values[10], values[300], values[20] = 50.0, 100.0, 9.0
    outputs = pd.DataFrame({"layer": [number // 100 for number in range(400)], "expert": 0, "largest": values})
    assert mark_super(outputs, last=3).to_numpy().nonzero()[0].tolist() == [10, 300]
    assert mark_super(outputs, last=2).to_numpy().nonzero()[0].tolist() == [10]
    values[10], values[20] = 9.0, 1.0
    under_a_tenth = outputs.assign(largest=values)
    assert mark_super(under_a_tenth, last=3).to_numpy().nonzero()[0].tolist() == [300]
    values[10:14] = [50.0, 60.0, 70.0, 80.0]
    under_the_quantile = outputs.assign(largest=values)
    assert mark_super(under_the_quantile, last=3).to_numpy().nonzero()[0].tolist() == [13, 300]


# --- Refusals and claims ----------------------------------------------------------------------------------------------


def test_where_nothing_carries_anything_the_error_says_why():
    with pytest.raises(MelensError, match="no massive activation that any weight could carry"):
        melens.analysis.carriers(study_of(bridge(plain_model("llama")), first=(20, 21, 22)))
    with pytest.raises(MelensError, match="n_rows is 96; it must be less than the 96 rows"):
        melens.analysis.carriers(planted("llama"), n_rows=96)


HOLDS = {
    "share": 0.9, "share_interval": (0.8, 1.0), "scalar_agreement": 1.0, "left": 0.1, "left_interval": (0.05, 0.15),
    "left_control": 1.0, "dloss": 2.0, "dloss_interval": (1.0, 3.0), "dloss_control": 0.0, "dloss_top": 3.0,
    "dloss_top_interval": (2.0, 4.0), "dloss_rest": 0.5, "top_over_rest": 2.5, "top_over_rest_interval": (1.5, 3.5),
    "experts_left": 0.05, "experts_left_interval": (0.03, 0.07), "experts_left_random": 1.0, "top_rows": 5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("claim", "metrics", "expected"),
    [
        ("one-scalar", {}, "holds"),
        ("one-scalar", {"share_interval": (0.4, 1.0)}, "holds in part"),
        ("one-scalar", {"share": 0.09, "share_interval": (0.0, 0.2)}, "does not hold"),
        ("one-scalar", {"share": None, "scalars_why_not": "No FFN."}, "not measured"),
        ("scalar-makes-massive", {}, "holds"),
        ("scalar-makes-massive", {"left_interval": (0.0, 0.26)}, "holds in part"),
        ("scalar-makes-massive", {"left_control": 0.4}, "holds in part"),
        ("scalar-makes-massive", {"left": 0.6, "left_interval": (0.5, 0.7)}, "does not hold"),
        ("scalar-breaks", {}, "holds"),
        ("scalar-breaks", {"dloss_control": 0.2}, "holds in part"),
        ("scalar-breaks", {"dloss": 0.3, "dloss_interval": (0.2, 0.4)}, "holds in part"),
        ("scalar-breaks", {"dloss": 0.05, "dloss_interval": (0.0, 0.1)}, "does not hold"),
        ("few-rows", {}, "holds"),
        ("few-rows", {"dloss_top": 0.3, "dloss_top_interval": (0.2, 0.4)}, "holds in part"),
        ("few-rows", {"top_over_rest": -1.0, "top_over_rest_interval": (-2.0, 0.0)}, "does not hold"),
        ("few-rows", {"dloss_top": 0.0, "dloss_top_interval": (-0.1, 0.1)}, "does not hold"),
        ("super-experts", {}, "holds"),
        ("super-experts", {"experts_left_random": 0.4}, "holds in part"),
        ("super-experts", {"experts_left": 0.6, "experts_left_interval": (0.5, 0.7)}, "does not hold"),
        ("super-experts", {"experts_left": None, "experts_why_not": "No mixture."}, "not measured"),
    ],
)
def test_what_carries_the_massive_activation_is_judged(claim, metrics, expected):
    shared = {"me_layer": 2, "n_prompts": 9, "distinct_first_tokens": 9, "last_lasting_layer": 27}
    result = {"experiment": "weights", "model": {"name": "m"}, "metrics": shared | HOLDS | metrics}
    assert melens.judge(result).set_index("id").verdict[claim] == expected
