"""What follows from a massive activation, on planted models of which the truth is known, and on metrics by hand."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from planted import bridge, plant
from transformers import AutoConfig, AutoModelForCausalLM

import melens
from melens import Criterion, MelensError
from melens.analysis import massive_state

BLOCK, SOURCE, DIM, EVERY, N_TOKENS = 2, 3, 5, 9, 16
FIRST = (7, 8, 6)
STRENGTHS = (10.0, 40.0, 10.0)
"""The tokens that the planted block makes massive, and what their embeddings have for it to read."""

SIZES = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip


@cache
@torch.no_grad()
def model_with_sinks(*keys_read):
    """A Llama whose only keys are of tokens with a component along `keys_read`; every query asks for them alike.

    `DIM` is what the planted block makes massive in `FIRST`, `SOURCE` what their embeddings have. Where neither is
    read, keys are 0 and attention is equal.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **SIZES)
        network = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plant(network, block=BLOCK, token=FIRST[0], dim=DIM, source_dim=SOURCE)
    embedding = network.get_input_embeddings().weight
    embedding[list(FIRST), SOURCE] = torch.tensor(STRENGTHS)
    embedding[:, EVERY] = 3
    embedding[:, DIM] = 0
    for number, layer in enumerate(network.base_model.layers):
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight[EVERY] = 0
            weight[DIM, 1:] = 0
            weight[DIM, 0] *= number == BLOCK and weight is layer.mlp.down_proj.weight
        for weight, dims in ((layer.self_attn.q_proj.weight, (EVERY,)), (layer.self_attn.k_proj.weight, keys_read)):
            weight[:] = 0
            for dim in dims:
                weight[15::16, dim] = 6  # the last dim of a head, whose angle hardly turns
    return bridge(network)


def study_of(model, n=4, first=FIRST):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 200, (N_TOKENS + extra,), generator=generator) for extra in range(n)]
    for number, prompt in enumerate(prompts):
        prompt[0] = first[number % len(first)]
    return melens.study(model, prompts, criterion=Criterion(trailing_blocks=1))


@pytest.fixture(scope="module")
def followed():
    return melens.analysis.consequence(study_of(model_with_sinks(DIM)), max_tokens=N_TOKENS)


@pytest.fixture(scope="module")
def unmoved():
    return melens.analysis.consequence(study_of(model_with_sinks(DIM, SOURCE)), max_tokens=N_TOKENS)


def test_sinks_that_read_the_massive_state_go_with_it_and_come_earlier(followed):
    metrics = followed.metrics
    assert (metrics.me_layer, metrics.removed_layers, metrics.texts) == (BLOCK, [BLOCK], 3)  # one for each first token
    assert metrics.norm_left < 0.1
    assert (metrics.sink_layers, metrics.sink_layers_before, metrics.sink_layers_left) == ([3, 4], [], [])
    assert metrics.sink_mass_intact > 0.9
    equal = sum(1 / n for n in range(2, N_TOKENS + 1)) / (N_TOKENS - 1)  # of query n on token 0: 1 / (n + 1)
    assert metrics.sink_mass_without == pytest.approx(equal, abs=1e-4)
    assert metrics.sinks_left == pytest.approx(0, abs=1e-3)
    assert metrics.sinks_left_control == pytest.approx(1, abs=0.05)
    assert (metrics.written_at, metrics.earlier_layers, metrics.earlier_sink_layers) == (0, [1, 2], [1, 2])
    assert metrics.sink_mass_before == pytest.approx(equal, abs=1e-4)
    assert metrics.sink_mass_earlier > 0.9
    verdicts = followed.claims.set_index("id").verdict
    assert verdicts[["sinks-follow", "sinks-earlier"]].eq("holds").all()


def test_sinks_that_read_something_else_as_well_stay(unmoved):
    metrics = unmoved.metrics
    assert metrics.norm_left < 0.1
    assert metrics.sink_layers_left == metrics.sink_layers == [3, 4]
    assert metrics.sink_layers_before == [0, 1, 2]
    assert metrics.sinks_left > 0.8
    verdicts = unmoved.claims.set_index("id")
    assert verdicts.verdict["sinks-follow"] == "does not hold"
    assert "A sink stays in blocks 3 and 4. There is one before, in blocks 0, 1 and 2." in verdicts.note["sinks-follow"]
    assert verdicts.verdict["sinks-earlier"] == "not measured"  # in these blocks there are sinks already
    assert metrics.earlier_why_not == "Of the blocks from 1 to the ME layer all have a sink intact: blocks 1 and 2."


def test_an_entry_is_put_to_the_mean_of_the_other_texts():
    states = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]])
    expected = torch.tensor([[4.0, 40.0], [3.5, 35.0], [1.5, 15.0]])
    torch.testing.assert_close(massive_state._means_of_others(states), expected)


def test_all_massive_tokens_of_a_text_count_and_the_largest_leads():
    prompts = [torch.randint(10, 200, (N_TOKENS,), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for prompt in prompts:
        prompt[0], prompt[5] = FIRST[0], FIRST[1]
    study = melens.study(model_with_sinks(DIM), prompts, criterion=Criterion(trailing_blocks=1))
    texts = massive_state._texts(study, n_prompts=2, max_tokens=N_TOKENS)
    assert texts.positions == [5, 5]
    assert texts.is_massive.nonzero().tolist() == [[text, pos, DIM] for text in (0, 1) for pos in (0, 5)]
    ran = massive_state._run_all(texts)
    removed = ran[massive_state.REMOVED]
    assert (removed.norms[:, BLOCK:] < 0.1 * ran[massive_state.INTACT].norms[:, BLOCK:]).all()
    equal = sum(1 / n for n in range(7, N_TOKENS + 1)) / (N_TOKENS - 6)  # queries 6 to 15 on token 5
    assert texts.equal_attention == pytest.approx([equal, equal])
    assert removed.sink_mass[:, 3].tolist() == pytest.approx([equal, equal], abs=1e-4)  # no other token is massive


def test_zero_and_mean_change_the_massive_entries_alone_where_they_are_formed(followed):
    study = study_of(model_with_sinks(DIM), n=3)
    texts = massive_state._texts(study, n_prompts=3, max_tokens=N_TOKENS)
    ran = massive_state._run_all(texts)
    intact, zero, mean = (ran[name].states for name in (massive_state.INTACT, massive_state.ZERO, massive_state.MEAN))
    assert (zero[:, BLOCK, DIM] == 0).all()
    of_others = [(intact[:, BLOCK, DIM].sum() - own) / 2 for own in intact[:, BLOCK, DIM]]
    torch.testing.assert_close(mean[:, BLOCK, DIM], torch.stack(of_others))
    rest = [dim for dim in range(64) if dim != DIM]
    for changed in (zero, mean):
        torch.testing.assert_close(changed[:, BLOCK, rest], intact[:, BLOCK, rest])
        torch.testing.assert_close(changed[:, :BLOCK], intact[:, :BLOCK])
    losses = {name: float((run.loss - ran[massive_state.INTACT].loss).mean()) for name, run in ran.items()}
    assert followed.metrics.dloss_zero == pytest.approx(losses[massive_state.ZERO])
    assert followed.metrics.dloss_mean == pytest.approx(losses[massive_state.MEAN])
    assert followed.metrics.dloss_removed == pytest.approx(losses[massive_state.REMOVED])


def test_where_nothing_can_follow_the_error_says_why():
    model = model_with_sinks(DIM)
    with pytest.raises(MelensError, match="no massive activation from which anything could follow"):
        melens.analysis.consequence(study_of(model, first=(20, 21, 22)))
    with pytest.raises(MelensError, match="No prompt has 8 tokens behind its massive token among its first 8"):
        melens.analysis.consequence(study_of(model), max_tokens=8)


def test_a_massive_activation_of_block_0_cannot_come_earlier():
    texts = massive_state._texts(study_of(model_with_sinks(DIM)), n_prompts=3, max_tokens=N_TOKENS)
    ran = {massive_state.INTACT: texts.runs.intact}
    assert texts.written_at == 0
    assert replace(texts, formed=BLOCK + 2).removed_layers == [BLOCK, BLOCK + 1, BLOCK + 2]  # of a slow climb
    first = replace(texts, me_layer=0)
    assert first.written_at is None
    assert massive_state._written_earlier(first, ran) == {"earlier_why_not": "No block lies before the ME layer."}


# --- Claims -----------------------------------------------------------------------------------------------------------

FOLLOW = {
    "norm_left": 0.02, "sinks_left": 0.05, "sinks_left_interval": (0.03, 0.07), "sinks_left_control": 1.0,
    "sinks_left_zero": 0.4, "sink_layers": [12, 13],
}  # fmt: skip
EARLIER = {
    "sink_layers": [12], "earlier_layers": [6, 7], "earlier_sink_layers": [6, 7], "sink_mass_earlier": 0.5,
    "sink_mass_earlier_interval": (0.4, 0.6),
}  # fmt: skip
LITTLE = {"sink_mass_earlier": 0.2, "sink_mass_earlier_interval": (0.1, 0.3)}
MEAN = {"dloss_zero": 5.0, "dloss_mean": 0.002, "dloss_mean_interval": (-0.005, 0.009)}
NO_SINKS = {"sink_layers": [], "sinks_why_not": "No sink."}


@pytest.mark.parametrize(
    ("claim", "metrics", "expected"),
    [
        ("sinks-follow", FOLLOW, "holds"),
        ("sinks-follow", FOLLOW | {"sinks_left_interval": (0.0, 0.11)}, "holds in part"),
        ("sinks-follow", FOLLOW | {"sink_layers_left": [12]}, "holds in part"),
        ("sinks-follow", FOLLOW | {"sink_layers_before": [3]}, "holds in part"),
        ("sinks-follow", FOLLOW | {"sinks_left_control": 0.49}, "holds in part"),
        ("sinks-follow", FOLLOW | {"sinks_left": 0.5, "sinks_left_interval": (0.4, 0.6)}, "holds in part"),
        ("sinks-follow", FOLLOW | {"sinks_left": 0.51, "sinks_left_interval": (0.4, 0.6)}, "does not hold"),
        ("sinks-follow", FOLLOW | {"norm_left": 0.51}, "not measured"),  # another block makes it massive
        ("sinks-follow", {"norm_left": 0.02, **NO_SINKS}, "not measured"),
        ("sinks-earlier", EARLIER, "holds"),
        ("sinks-earlier", EARLIER | {"sink_mass_earlier_interval": (0.29, 0.7)}, "holds in part"),
        ("sinks-earlier", EARLIER | LITTLE | {"earlier_sink_layers": [6]}, "holds in part"),
        ("sinks-earlier", EARLIER | LITTLE | {"earlier_sink_layers": []}, "does not hold"),
        ("sinks-earlier", EARLIER | NO_SINKS, "not measured"),
        ("sinks-earlier", {"sink_layers": [12], "earlier_why_not": "No block."}, "not measured"),
        ("zero-harms", {"dloss_zero": 5.0, "dloss_zero_interval": (0.7, 9.3)}, "holds"),
        ("zero-harms", {"dloss_zero": 5.0, "dloss_zero_interval": (0.6, 9.4)}, "holds in part"),
        ("zero-harms", {"dloss_zero": 0.09, "dloss_zero_interval": (0.08, 0.1)}, "does not hold"),
        ("mean-harmless", MEAN, "holds"),
        ("mean-harmless", MEAN | {"dloss_mean_interval": (-0.005, 0.011)}, "holds in part"),
        ("mean-harmless", MEAN | {"dloss_mean": 0.5, "dloss_mean_interval": (0.4, 0.6)}, "holds in part"),
        ("mean-harmless", MEAN | {"dloss_mean": 0.51, "dloss_mean_interval": (0.4, 0.6)}, "does not hold"),
        ("mean-harmless", MEAN | {"dloss_zero": 0.01}, "not measured"),
        ("mean-harmless", {"dloss_zero": 5.0, "mean_why_not": "One prompt."}, "not measured"),
        ("mean-harmless", MEAN | {"distinct_first_tokens": 1}, "trivial here"),  # the mean is every text's own state
    ],
)
def test_what_follows_from_the_massive_activation_is_judged(claim, metrics, expected):
    shared = {"me_layer": 11, "n_prompts": 9, "distinct_first_tokens": 9, "last_lasting_layer": 27}
    result = {"experiment": "consequence", "model": {"name": "m"}, "metrics": shared | metrics}
    assert melens.judge(result).set_index("id").verdict[claim] == expected
