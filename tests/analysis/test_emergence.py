import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import emergence_by_hand
from planted import FAMILIES, N_LAYERS, VOCABULARY, bridge, plain_model, plant

import melens
from melens import Criterion, MelensError
from melens.analysis.me_layer import one_a_state

TOKEN, DIM = 7, 21


def prompts_with(token, position, n=5):
    """Prompts with the token at one position, and nowhere else."""
    generator = torch.Generator().manual_seed(position)
    prompts = [torch.randint(10, VOCABULARY, (length,), generator=generator) for length in range(8, 8 + n)]
    for prompt in prompts:
        prompt[position] = token
    return prompts


@pytest.mark.parametrize("block", range(N_LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_massive_activation_is_found(family, block):
    network = plain_model(family)
    plant(network, block=block, token=TOKEN, dim=DIM)
    position = block  # another one each time
    me = melens.find_me_layer(melens.trace(bridge(network), prompts_with(TOKEN, position)))
    assert me.layer == block
    assert me.positions == (position,)
    assert me.dims == (DIM,)
    assert (me.agreement, me.prompts_with) == (1, 1)
    assert (me.per_prompt["first_is_massive"] == (position == 0)).all()
    assert me.kind == "one block"
    assert me.magnification > 100
    assert me.relative_magnification > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unplanted_twin_has_none(family):
    me = melens.find_me_layer(melens.trace(bridge(plain_model(family)), prompts_with(TOKEN, 0)))
    assert me.layer is None
    assert me.kind is None
    assert "No block's output" in me.reason
    assert me.metrics()["me_layer"] is None


def test_a_token_that_is_not_planted_stays_ordinary():
    network = plain_model("llama")
    plant(network, block=1, token=TOKEN, dim=DIM)
    assert melens.find_me_layer(melens.trace(bridge(network), prompts_with(TOKEN + 1, 0))).layer is None


def test_all_massive_tokens_are_found_however_many():
    network = plain_model("llama")
    plant(network, block=2, token=TOKEN, dim=DIM)
    (prompt,) = prompts_with(TOKEN, 0, n=1)
    ordinary = [token for token in prompt.tolist() if token != TOKEN]
    many = torch.tensor([TOKEN] * 12 + ordinary)
    trace = melens.trace(bridge(network), [many])
    me = melens.find_me_layer(trace)
    massive = melens.massive_activations(trace).query("layer == 2")
    assert sorted(massive["pos"].unique()) == sorted(me.positions) == list(range(12))
    assert me.dims == (DIM,)
    norms = trace["norm"].query("site == 'hook_resid_post'").pivot(index="layer", columns="pos", values="norm")
    rises = (norms.loc[2] / norms.loc[1]).to_numpy()
    assert me.relative_magnification == pytest.approx(me.magnification / rises[12:].mean(), rel=1e-5)
    assert me.relative_magnification > 100


def test_a_lower_criterion_than_the_trace_was_made_for_is_not_answered_in_part():
    model = bridge(plain_model("llama"))
    (prompt,) = prompts_with(TOKEN, 0, n=1)
    everything = Criterion(min_abs=0, min_ratio=0)
    prompts = [torch.cat([prompt, prompt])]
    with pytest.raises(MelensError, match=r"trace with melens\.default_probes\(model, min_abs=0\)"):
        melens.massive_activations(melens.trace(model, prompts), everything)
    trace = melens.trace(model, prompts, melens.default_probes(model, min_abs=0))
    found = melens.massive_activations(trace, everything).query("layer == 1")
    assert sorted(found["pos"].unique()) == list(range(16))
    short = melens.massive_activations(melens.trace(model, [prompt]), everything)  # eight tokens: all are kept
    assert sorted(short["pos"].unique()) == list(range(8))


def test_the_me_layer_is_the_most_frequent_block_also_without_a_majority():
    network = plain_model("llama")
    for block, token in ((1, 7), (2, 8), (3, 9)):
        plant(network, block=block, token=token, dim=DIM, source_dim=block)
    with torch.no_grad():
        for block, token in ((1, 17), (2, 18), (2, 28), (3, 19)):
            network.get_input_embeddings().weight[token] = 0
            network.get_input_embeddings().weight[token, [block, token]] = 10
    firsts = [7, 8, 18, 9, 17, 28, 19]
    me = melens.find_me_layer(
        melens.trace(bridge(network), [torch.tensor([first, 20, 30, 40, 50]) for first in firsts])
    )
    assert me.layer == 2
    assert me.reason == "First massive at block 2 in 3 of 7 prompts (block 1 in 2, block 3 in 2)."


def test_a_massive_activation_in_few_prompts_is_no_me_layer():
    network = plain_model("llama")
    plant(network, block=1, token=TOKEN, dim=DIM)
    prompts = prompts_with(TOKEN, 0, n=1) + prompts_with(TOKEN + 1, 0, n=3)
    me = melens.find_me_layer(melens.trace(bridge(network), prompts))
    assert me.layer is None
    assert me.reason == "Only 1 of 4 prompts hold a massive activation at any block."


def trace_by_hand(*token_norms):
    """A trace of one prompt of three tokens: token 0 has these norms (embedding, then blocks), the others norm 1."""
    n_layers = len(token_norms) - 1
    at = [(-1, "hook_resid_pre"), *((layer, "hook_resid_post") for layer in range(n_layers))]
    norms = [
        {"prompt": 0, "layer": max(layer, 0), "site": site, "pos": pos, "norm": norm if pos == 0 else 1.0}
        for (layer, site), norm in zip(at, token_norms, strict=True)
        for pos in range(3)
    ]
    by_layer = [{"prompt": 0, "layer": layer, "site": "hook_resid_post"} for layer in range(n_layers)]
    largest = [
        row | {"rank": 0, "pos": 0, "dim": 5, "value": norm}
        for row, norm in zip(by_layer, token_norms[1:], strict=True)
    ]
    return melens.Trace(
        model={"n_layers": n_layers},
        prompts=pd.DataFrame({"prompt": [0], "n_tokens": [3], "first_token_id": [1]}),
        tables={
            "norm": pd.DataFrame(norms),
            "largest": pd.DataFrame(largest),
            "abs_median": pd.DataFrame([row | {"abs_median": 0.1} for row in by_layer]),
        },
    )


@pytest.mark.parametrize(
    ("token_norms", "layer", "kind", "magnification", "share"),
    [
        ((1, 2, 2, 1000, 1000, 1000, 9000, 9000), 2, "one block", 500, 0.998),
        ((1, 2, 2, 400, 1000, 1000, 1000, 9, 9), 2, "a few blocks", 200, 0.398),
        ((1, 50, 101, 200, 300, 500, 700, 1000, 9, 9), 1, "slow climb", 2.02, 0.051),
        ((1, 1, 1, 1, 1, 1, 500), 5, "one block", 500, 0.998),  # in a trailing block: its own peak
    ],
)
def test_how_it_emerges_by_hand(token_norms, layer, kind, magnification, share):
    me = melens.find_me_layer(trace_by_hand(*token_norms))
    assert (me.layer, me.kind) == (layer, kind)
    assert me.magnification == pytest.approx(magnification)
    assert me.relative_magnification == pytest.approx(magnification)  # the others stay at 1
    assert me.share_of_peak == pytest.approx(share)


def test_the_rise_by_hand():
    """From 4 to 400 in block 1, to 500 in block 2; the others rise by 3 and by 5, and blocks 3 and 4 count apart."""
    trace = trace_by_hand(2, 4, 400, 500, 900, 1)
    norms = trace["norm"]
    for pos, lifted in ((1, 3.0), (2, 5.0)):
        norms.loc[(norms["site"] == "hook_resid_post") & (norms["layer"] == 1) & (norms["pos"] == pos), "norm"] = lifted
    me = melens.find_me_layer(trace)
    assert (me.layer, me.magnification) == (1, 100)
    assert me.relative_magnification == pytest.approx(100 / 4)
    assert me.share_of_peak == pytest.approx((400 - 4) / 500)
    assert (me.climb, me.kind) == ((1, 2), "a few blocks")


def climb_by_hand():
    """One prompt: block 1 makes token 2 massive in dim 4, block 3 tokens 0, 2 and 3, of which token 0 in dim 6 too."""
    token_norms = {pos: [1.0] * 8 for pos in range(5)}  # embedding, then seven blocks, of which two count apart
    token_norms |= {
        0: [1, 1, 200, 300, 90_000, 90_000, 9, 9],
        2: [1, 1, 500, 300, 300, 300, 9, 9],
        3: [1, 1, 1, 1, 300, 300, 9, 9],
    }
    norms, largest = [], []
    for pos, (embedded, *values) in token_norms.items():
        norms.append({"prompt": 0, "layer": 0, "site": "hook_resid_pre", "pos": pos, "norm": float(embedded)})
        for layer, norm in enumerate(map(float, values)):
            state = {"prompt": 0, "layer": layer, "site": "hook_resid_post", "pos": pos}
            norms.append(state | {"norm": norm})
            largest.append(state | {"dim": 4, "value": min(norm, 250.0)})
            if layer >= 3 and pos == 0:
                largest.append(state | {"dim": 6, "value": -norm})
    medians = [{"prompt": 0, "layer": layer, "site": "hook_resid_post", "abs_median": 0.1} for layer in range(7)]
    return melens.Trace(
        model={"n_layers": 7},
        prompts=pd.DataFrame({"prompt": [0], "n_tokens": [5], "first_token_id": [1]}),
        tables={"norm": pd.DataFrame(norms), "largest": pd.DataFrame(largest), "abs_median": pd.DataFrame(medians)},
    )


def test_dims_and_positions_are_those_of_the_formed_state_and_not_of_the_first_block_of_a_climb():
    me = melens.find_me_layer(climb_by_hand())
    assert (me.layer, me.formed) == (1, 3)
    assert me.dims == (6, 4)  # the prompt has both, dim 4 in three tokens; dim 6 is the larger
    assert me.positions == (0, 2, 3)
    assert me.magnification == 500  # of token 2, as table 8 has it
    assert me.per_prompt[["pos", "formed", "formed_pos", "n_massive"]].to_numpy().tolist() == [[2, 3, 0, 3]]
    assert me.per_prompt["first_is_massive"].tolist() == [True]


@pytest.mark.parametrize(
    ("token_norms", "formed"),
    [
        ((1, 1, 801, 850, 1000, 1000, 9, 9), 1),  # the ME layer brings 80% of the peak
        ((1, 1, 800, 850, 1000, 1000, 9, 9), 3),
        ((1, 1, 200, 890, 1000, 1000, 9, 9), 3),
        ((1, 1, 200, 900, 1000, 1000, 9, 9), 2),  # 90% of the peak
        ((1, 1, 400, 400, 400, 400, 9000, 9000), 1),  # the trailing blocks count apart
        ((1, 1, 1, 1, 1, 1, 200, 400), 5),  # but where nothing was massive before them
    ],
)
def test_the_block_that_forms_the_state_by_hand(token_norms, formed):
    assert melens.find_me_layer(trace_by_hand(*token_norms)).formed == formed


def test_a_slow_climb_in_a_model_is_formed_where_it_ends():
    """Block 0 makes dim 9 massive, block 2 dim 21 many times as much, and the last block counts apart."""
    network = plain_model("llama")
    plant(network, block=0, token=TOKEN, dim=9, source_dim=3)
    plant(network, block=2, token=TOKEN, dim=DIM, source_dim=4)
    with torch.no_grad():
        network.base_model.layers[0].mlp.down_proj.weight[9, 0] = 50
        network.base_model.layers[2].mlp.down_proj.weight[DIM, 0] = 1e8
    model, criterion = bridge(network), Criterion(trailing_blocks=1)
    study = melens.study(model, prompts_with(TOKEN, 0, n=3), criterion=criterion)
    assert (study.me.layer, study.me.formed, study.massive_layers) == (0, 2, range(2, 3))
    assert study.me.dims[0] == DIM
    mask = melens.WeMask(select="massive", start=3).at(study.me)
    assert mask.dims(model)[3].tolist() == sorted(study.me.dims) == [9, DIM]


@pytest.mark.parametrize(("value", "layer"), [(100.0, None), (100.1, 0), (99.0, None)])
def test_the_criterion_is_strict(value, layer):
    assert melens.find_me_layer(trace_by_hand(1, value, value, value)).layer == layer


def test_magnification_is_the_ratio_of_norms():
    network = plain_model("qwen2")
    plant(network, block=2, token=TOKEN, dim=DIM)
    model = bridge(network)
    (prompt,) = prompts_with(TOKEN, 0, n=1)
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt[None])
    lift = (cache["blocks.2.hook_resid_post"].norm(dim=-1) / cache["blocks.2.hook_resid_pre"].norm(dim=-1))[0]
    me = melens.find_me_layer(melens.trace(model, [prompt]))
    assert me.magnification == pytest.approx(lift[0].item(), rel=1e-4)
    assert me.relative_magnification == pytest.approx((lift[0] / lift[1:].mean()).item(), rel=1e-4)


def test_the_embedded_model(embedded_trace):
    me = melens.find_me_layer(embedded_trace)
    assert me.layer == 11
    assert me.magnification == pytest.approx(153, rel=0.05)
    assert me.positions == (0,)
    assert me.dims[0] == 507
    assert me.kind == "one block"
    assert me.distinct_first_tokens == 8


def test_the_embedded_model_stays_the_same_after_a_round_trip(embedded_trace, tmp_path):
    loaded = melens.Trace.load(embedded_trace.save(tmp_path / "trace"))
    assert melens.find_me_layer(loaded).metrics() == melens.find_me_layer(embedded_trace).metrics()


def test_a_model_that_overflows_is_told():
    network = plain_model("llama")
    with torch.no_grad():
        network.base_model.layers[2].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(MelensError, match="block 2 is not finite in 2 of 2 prompts"):
        melens.find_me_layer(melens.trace(bridge(network), prompts_with(TOKEN, 0, n=2)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("table", "row", "message"),
    [
        ("norm", {"site": "hook_resid_pre", "pos": 1}, "The output of the embeddings is not finite"),
        ("norm", {"site": "hook_resid_post", "layer": 1, "pos": 1}, "The output of block 1 is not finite"),
        ("largest", {"layer": 2}, "The output of block 2 is not finite"),
        ("abs_median", {"layer": 0}, "The output of block 0 is not finite"),
    ],
)
def test_nothing_that_is_read_may_be_no_number(table, row, message, value):
    trace = trace_by_hand(1.0, 2.0, 2.0, 1000.0)
    place = np.logical_and.reduce([trace[table][name] == at for name, at in row.items()])
    trace[table].loc[place, trace[table].columns[-1]] = value
    with pytest.raises(MelensError, match=f"{message} in 1 of 1 prompts, first in prompt 0"):
        melens.find_me_layer(trace)


def test_a_norm_that_the_trace_lacks_is_no_smaller_than_another():
    trace = trace_by_hand(1, 2, 2, 1000)
    trace.tables["norm"] = trace["norm"].drop(index=4)
    with pytest.raises(MelensError, match="needs the norms of the embeddings and of every block's output"):
        melens.find_me_layer(trace)


def test_a_token_whose_embedding_is_zero_is_not_compared_with():
    trace = trace_by_hand(1, 1000, 1000, 1000)
    norms = trace["norm"]
    norms.loc[(norms["site"] == "hook_resid_pre") & (norms["pos"] == 2), "norm"] = 0.0
    me = melens.find_me_layer(trace)
    assert (me.magnification, me.relative_magnification) == (1000, 1000)
    norms.loc[norms["site"] == "hook_resid_pre", "norm"] = [1.0, 0.0, 0.0]
    assert math.isnan(melens.find_me_layer(trace).relative_magnification)


@pytest.mark.parametrize("wrong", [{"min_ratio": -1}, {"one_block": float("nan")}])
def test_a_wrong_criterion_is_told(wrong):
    with pytest.raises(MelensError, match=next(iter(wrong))):
        Criterion(**wrong)


def test_a_trace_without_the_norms_of_every_block_is_told():
    probes = [melens.Norms(layers=(1, 2)), melens.LargestActivations(), melens.AbsMedian()]
    with pytest.raises(MelensError, match="every block's output"):
        melens.find_me_layer(melens.trace(bridge(plain_model("llama")), prompts_with(TOKEN, 0), probes))


def test_prompts_of_fewer_tokens_than_are_kept_have_an_me_layer_too():
    network = plain_model("llama")
    plant(network, block=1, token=TOKEN, dim=DIM)
    prompts = [torch.tensor([TOKEN, *range(20, 25)]), torch.tensor([TOKEN, *range(40, 46)])]  # in one batch
    trace = melens.trace(bridge(network), prompts)
    empty = trace["largest"].query("prompt == 0 and pos < 0")
    assert len(empty) == N_LAYERS * 8  # of the seventh token, with eight dims
    assert empty["value"].isna().all()
    assert melens.find_me_layer(trace).layer == 1


def test_an_emergence_shows_itself_in_a_line():
    me = melens.find_me_layer(trace_by_hand(1, 2, 400, 400, 400))
    assert repr(me) == "block 1 of 4, × 200, token 0, dim 5"
    assert repr(emergence_by_hand(11, [(11, 3)], first_tokens=[1], n_layers=30)) == (
        "block 11 of 30, × 200 (180 to 220), token 3, dim 5"
    )
    assert repr(melens.find_me_layer(trace_by_hand(1, 2, 2, 2))) == "no ME layer among 3 blocks"


def test_what_one_first_token_alone_shows_of_several_holds_in_part():
    network = plain_model("llama")
    plant(network, block=2, token=TOKEN, dim=DIM)
    prompts = [*prompts_with(TOKEN, 0, n=2), *prompts_with(TOKEN + 1, 0, n=1)]  # the last has no massive token
    study = melens.study(bridge(network), prompts)
    assert (study.me.layer, study.me.distinct_first_tokens) == (2, 2)
    assert np.isnan(study.me.magnification_interval).all()
    judged = melens.analysis.emergence(study).claims.set_index("id").verdict
    assert (judged["magnification"], judged["single-block"]) == ("holds in part", "holds in part")


def test_prompts_that_share_their_first_token_count_once_in_the_magnification():
    network = plain_model("llama")
    for token, size in ((TOKEN, 1), (TOKEN + 1, 3)):
        plant(network, block=2, token=token, dim=DIM)
        with torch.no_grad():
            network.get_input_embeddings().weight[token] *= size
    with torch.no_grad():
        network.get_input_embeddings().weight[TOKEN, 3] = 10
    prompts = [*prompts_with(TOKEN, 0, n=4), *prompts_with(TOKEN + 1, 0, n=1)]
    me = melens.find_me_layer(melens.trace(bridge(network), prompts))
    each = me.per_prompt["magnification"]
    assert each[0] != pytest.approx(each[4], rel=0.1)
    assert me.magnification == pytest.approx((each[0] + each[4]) / 2)


def test_copies_of_one_state_do_not_outvote_others():
    network = plain_model("llama")
    plant(network, block=1, token=TOKEN, dim=DIM)
    copies = prompts_with(TOKEN, 0, n=5)
    plant(network, block=2, token=TOKEN + 1, dim=DIM, source_dim=4)
    with torch.no_grad():
        for token in (TOKEN + 1, TOKEN + 2):
            network.get_input_embeddings().weight[token, 4] = 10
    others = [prompts_with(token, 0, n=1)[0] for token in (TOKEN + 1, TOKEN + 2)]
    me = melens.find_me_layer(melens.trace(bridge(network), [*copies, *others]))
    assert me.per_prompt["layer"].tolist() == [1] * 5 + [2] * 2
    assert me.layer == 2
    assert me.reason == (
        "First massive at block 2 in 2 of 7 prompts (block 1 in 5). Prompts that share a massive first token share its "
        "every state, and count once."
    )


def test_prompts_that_share_neither_token_nor_block_are_no_one_state():
    prompts = pd.DataFrame({"first_token_id": [13, 14, 13], "layer": [2, -1, 2], "pos": [0, 0, 0]})
    assert one_a_state(prompts).index.tolist() == [0, 1]


def test_the_order_of_a_traces_prompts_does_not_matter_but_their_numbers_do():
    network = plain_model("llama")
    plant(network, block=1, token=7, dim=21)
    model = bridge(network)
    trace = melens.trace(model, [torch.tensor([7, 8, 9]), torch.tensor([9, 7, 8, 11]), torch.tensor([7, 11])])
    shuffled = replace(trace, prompts=trace.prompts.iloc[[2, 0, 1]])
    found, expected = melens.find_me_layer(shuffled), melens.find_me_layer(trace)
    assert expected.layer == 1
    assert str(found.metrics()) == str(expected.metrics())  # with NaN
    with pytest.raises(MelensError, match="must be numbered from 0 on"):
        melens.find_me_layer(replace(trace, prompts=trace.prompts.iloc[1:]))
