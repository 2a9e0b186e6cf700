"""Idle heads and sink heads: by hand, on a planted model whose sinks are idle, and judged."""

import copy
from functools import cache
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import study_by_hand
from planted import LATENT, OTHERS, SMALL, bridge, other_model, plant
from scipy.stats import spearmanr
from transformers import AutoConfig, AutoModelForCausalLM

import melens
from melens import Criterion, MelensError
from melens.analysis import head_benchmarks, head_idleness, head_zeroing
from melens.benchmarks.catalog import BENCHMARKS
from melens.benchmarks.language import language_data, make_questions
from melens.models.twins import plain_twin

N_LAYERS, N_HEADS = 7, 4


def probe_table(values, head="head", **columns):
    """Lay `[prompt][layer][head]` out as a probe's table."""
    rows = [
        {"prompt": prompt, "layer": layer, "site": "", head: at}
        | {name: own[prompt, layer, at] for name, own in columns.items()}
        for prompt, layer, at in np.ndindex(values.shape)
    ]
    return pd.DataFrame(rows)


def measured(sinks, outputs, values, first_tokens=None):
    """The parts of `heads` that need no forward pass, of arrays `[prompt, layer, head]`; values are ‖v_0‖ over 2."""
    tables = {
        "sink_mass": probe_table(sinks, sink_mass=sinks),
        "head_outputs": probe_table(outputs, output_norm=outputs * 0, output_norm_others=outputs),
        "value_norms": probe_table(values, "value_head", value_norm=values, value_norm_others=values * 0 + 2),
    }
    told = {"n_tokens": [100] * len(sinks)}
    study = study_by_hand(n_prompts=len(sinks), first_tokens=first_tokens, tables=tables, **told)
    by_prompt, why_not = head_idleness._by_prompt(study)
    by_input = head_idleness._by_input(study, by_prompt)
    table = by_input.groupby(["layer", "head"]).mean().reset_index()
    assert why_not == {}
    return by_input, table.assign(is_sink=table["sink_mass"] > head_idleness._threshold(study), heads_per_value=2)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0.01, 0.25, shape)


def test_a_heads_output_is_over_its_blocks_mean_and_its_values_are_those_it_reads():
    sinks, outputs, values = drawn(2, N_LAYERS, N_HEADS), drawn(2, N_LAYERS, N_HEADS, seed=1), drawn(2, N_LAYERS, 2)
    by_input, _ = measured(sinks, outputs, values)
    row = by_input.loc[(11, 3, 2)]  # the second prompt's first token is 11
    assert row["output_ratio"] == pytest.approx(outputs[1, 3, 2] / outputs[1, 3].mean())
    assert (row["value_head"], row["value_ratio"]) == (1, pytest.approx(values[1, 3, 1] / 2))
    assert by_input.loc[(11, 3, 1)]["value_head"] == 0


def test_prompts_that_share_a_first_token_are_one_input():
    sinks, outputs, values = drawn(3, N_LAYERS, N_HEADS), drawn(3, N_LAYERS, N_HEADS, seed=1), drawn(3, N_LAYERS, 2)
    by_input, _ = measured(sinks, outputs, values, first_tokens=[10, 10, 11])
    assert by_input.loc[(10, 0, 0)]["sink_mass"] == pytest.approx(sinks[:2, 0, 0].mean())
    assert by_input.index.get_level_values(0).nunique() == 2


def test_values_are_compared_where_a_head_of_theirs_has_a_sink():
    sinks, values = drawn(3, N_LAYERS, N_HEADS), np.full((3, N_LAYERS, 2), 2.0)
    sinks[:, 4, 3], sinks[:, 5, 0] = 0.9, 0.9
    values[:, 4, 1], values[:, 5, 0] = [0.2, 0.4, 0.6], 1.6  # ratios of 0.1, 0.2, 0.3, and of 0.8
    outputs = drawn(3, N_LAYERS, N_HEADS)
    found = head_idleness._values(*measured(sinks, outputs, values))
    assert found["value_drain"] == pytest.approx((0.2 + 0.8) / 2)
    assert found["value_drain_share"] == 0.5
    assert found["value_ratio_elsewhere"] == pytest.approx(1)
    low, high = found["value_drain_interval"]
    assert low == pytest.approx(0.5 - 4.3027 * 0.05 / 3**0.5, abs=1e-4)  # Student's t of 0.45, 0.5 and 0.55
    assert high == pytest.approx(1 - low, abs=1e-6)
    nowhere = head_idleness._values(*measured(outputs, outputs, values))
    assert nowhere["values_why_not"] == "No head has a mean sink mass over 0.3."


def test_overlap_and_correlation_by_independent_formulas():
    sinks, outputs = drawn(4, N_LAYERS, N_HEADS), drawn(4, N_LAYERS, N_HEADS, seed=1)
    sinks[:, 2, 1] += 1  # the strongest and the idlest
    outputs[:, 2, 1] = 1e-4
    by_input, table = measured(sinks, outputs, drawn(4, N_LAYERS, 2))
    found = head_idleness._sinks_and_outputs(by_input, table)
    ratios = outputs / outputs.mean(axis=2, keepdims=True)
    k, n = found["compared_heads"], N_LAYERS * N_HEADS
    assert (k, found["overlap_by_chance"]) == (3, pytest.approx(9 / 28))  # round(2.8)
    strongest = set(np.argsort(-sinks.mean(0).ravel())[:k])
    overlap = len(strongest & set(np.argsort(ratios.mean(0).ravel())[:k]))
    assert found["overlap"] == overlap >= 1
    drawn_sets = [len(strongest & set(each)) >= overlap for each in combinations(range(n), k)]
    assert found["overlap_p"] == pytest.approx(np.mean(drawn_sets))
    of_strongest = [ratios[prompt].ravel()[sorted(strongest)].mean() for prompt in range(4)]
    assert found["sink_output"] == pytest.approx(np.mean(of_strongest))
    pairs = [spearmanr(sinks[prompt].ravel(), ratios[prompt].ravel()).statistic for prompt in range(4)]
    assert found["rank_correlation"] == pytest.approx(np.mean(pairs))
    within = [
        np.mean([spearmanr(*both).statistic for both in zip(sinks[prompt], ratios[prompt], strict=True)])
        for prompt in range(4)
    ]
    assert found["rank_correlation_within"] == pytest.approx(np.mean(within))


def test_a_norm_that_is_no_number_is_named():
    sinks, outputs = drawn(2, N_LAYERS, N_HEADS), drawn(2, N_LAYERS, N_HEADS)
    outputs[1, 3, 2] = float("nan")
    with pytest.raises(MelensError, match="The output_norm_others of block 3 is nan in prompt 1"):
        measured(sinks, outputs, drawn(2, N_LAYERS, 2))


# --- Heads set to zero ------------------------------------------------------------------------------------------------


def test_heads_are_chosen_on_other_prompts_than_those_whose_loss_is_measured():
    study = study_by_hand(n_prompts=5, n_tokens=[8, 30, 20, 10, 40])
    assert head_zeroing.split_prompts(study, 9) == ([4, 2, 0], [1, 3])
    assert head_zeroing.split_prompts(study, 2) == ([4], [1])


def test_sets_are_nested_and_random_ones_are_drawn_by_the_seed():
    ranking = [(layer, head) for layer in range(5) for head in range(4)]
    rankings = {head_zeroing.IDLE: ranking, head_zeroing.SINKS: ranking[::-1]}
    sets = {each[:3]: each[3] for each in head_zeroing.sets_of_heads(rankings, (0.05, 0.1, 0.3), 2, 0)}
    assert sets[head_zeroing.IDLE, 0.1, 0] == ranking[:2]
    assert sets[head_zeroing.SINKS, 0.3, 0] == ranking[:-7:-1]
    small, large = sets[head_zeroing.RANDOM, 0.1, 1], sets[head_zeroing.RANDOM, 0.3, 1]
    assert small == large[:2]
    assert len(set(large)) == 6
    assert large != sets[head_zeroing.RANDOM, 0.3, 0]
    again = {each[:3]: each[3] for each in head_zeroing.sets_of_heads(rankings, (0.3,), 2, 0)}
    assert again[head_zeroing.RANDOM, 0.3, 1] == large
    other = {each[:3]: each[3] for each in head_zeroing.sets_of_heads(rankings, (0.3,), 2, 1)}
    assert other[head_zeroing.RANDOM, 0.3, 1] != large


def test_the_rise_is_averaged_over_draws_and_compared_prompt_by_prompt():
    rows = [(head_zeroing.IDLE, 0, prompt, 0.1 * prompt) for prompt in range(3)]
    rows += [(head_zeroing.SINKS, 0, prompt, 0.5) for prompt in range(3)]
    rows += [(head_zeroing.RANDOM, draw, prompt, 1 + draw + 0.1 * prompt) for draw in range(3) for prompt in range(3)]
    rises = pd.DataFrame(rows, columns=["heads", "draw", "prompt", "dloss"]).assign(share=0.1, n_heads=2)
    found = head_zeroing.rises_as_metrics(np.array([3.0, 4.0, 5.0]), rises)
    assert (found["loss"], found["zeroed_heads"], found["dloss_sinks"]) == (4.0, {"0.1": 2}, {"0.1": 0.5})
    assert found["dloss_random"]["0.1"] == pytest.approx(2.1)
    assert found["dloss_idle_tenth"] == pytest.approx(0.1)
    assert found["dloss_idle_less_random"] == pytest.approx(-2)
    reach = 4.3027 * 1 / 3**0.5  # of draws alone, -1, -2 and -3: prompts do not differ
    assert found["dloss_idle_less_random_interval"] == pytest.approx((-2 - reach, -2 + reach), abs=1e-3)


# --- A planted model --------------------------------------------------------------------------------------------------

BLOCK, DIM, SOURCE, EVERY, FIRST = 2, 5, 3, 9, (7, 8, 6, 5)
DORMANT = {(layer, head) for layer in (3, 4, 5) for head in (0, 1)}
"""Blocks behind the planted one, and the heads that read the one key head with a sink."""


@cache
@torch.no_grad()
def model_with_dormant_heads():
    """A Llama in which token 0's massive state is a key of the first of two key-value heads, and has no values."""
    sizes = {
        "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **sizes)
        network = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plant(network, block=BLOCK, token=FIRST[0], dim=DIM, source_dim=SOURCE)
    embedding = network.get_input_embeddings().weight
    embedding[list(FIRST), SOURCE] = torch.tensor([10.0, 20.0, 30.0, 40.0])
    embedding[:, EVERY] = 3
    embedding[:, DIM] = 0
    for layer in network.base_model.layers:
        attention = layer.self_attn
        for weight in (attention.o_proj.weight, layer.mlp.down_proj.weight):
            weight[EVERY] = 0
        attention.o_proj.weight[DIM] = 0
        attention.q_proj.weight[:], attention.k_proj.weight[:] = 0, 0
        attention.q_proj.weight[15::16, EVERY] = 6
        attention.k_proj.weight[15, DIM] = 6
        attention.v_proj.weight[:, DIM] = 0
    return bridge(network)


@pytest.fixture(scope="module")
def planted():
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 200, (24 + extra,), generator=generator) for extra in range(8)]
    for number, prompt in enumerate(prompts):
        prompt[0] = FIRST[number % len(FIRST)]
    study = melens.study(model_with_dormant_heads(), prompts, criterion=Criterion(trailing_blocks=1))
    return study, melens.analysis.heads(study, shares=[0.25], draws=3, max_tokens=24, entropy_tokens=24)


def test_sinks_that_write_nothing_are_found_idle_and_can_go(planted):
    _, found = planted
    metrics, table = found.metrics, found.tables["heads"].set_index(["layer", "head"])
    assert (metrics.me_layer, metrics.n_heads, metrics.inputs, metrics.heads_per_value) == (BLOCK, 24, 4, [2])
    assert set(table.index[table["is_sink"]]) == DORMANT
    assert set(table.index[table["idle_rank"] <= 6]) == set(table.index[table["sink_rank"] <= 6]) == DORMANT
    assert metrics.sink_heads == 6
    assert metrics.value_drain < 0.1 < 0.5 < metrics.value_ratio_elsewhere
    assert metrics.sink_output < 0.1
    assert table["entropy"][[*DORMANT]].max() < 0.2 < table["entropy_share"].drop([*DORMANT]).min()
    assert (metrics.chosen_on, metrics.texts, metrics.tokens_per_text) == (4, 4, 24)
    assert metrics.zeroed_heads == {"0.1": 2, "0.25": 6}
    rises = found.tables["loss_without_heads"].groupby("heads")["dloss"].apply(lambda own: own.abs().max())
    assert rises["idlest"] < 1e-3 < 0.1 < rises["random"]
    assert metrics.scores_intact.keys() == {"induction", "copy"}
    assert metrics.score_changes["copy"].keys() == {"idlest", "strongest sinks", "random"}
    assert all(len(figure.plot.data) > 1 for figure in found.figures.values())
    verdicts = found.claims.set_index("id").verdict
    assert verdicts[["values-drain", "sinks-dormant"]].eq("holds").all()


def test_the_loss_without_heads_is_that_of_a_model_without_them(planted):
    study, _ = planted
    busy = [(3, 2), (4, 3), *((layer, head) for layer in range(3) for head in range(4))]
    rankings = {head_zeroing.IDLE: busy, head_zeroing.SINKS: busy}
    told = {"draws": 1, "max_tokens": 12}
    intact, rises = head_zeroing.without_heads(study, rankings, [5, 2], [2 / 14], **told)
    rise = rises[rises["heads"] == head_zeroing.IDLE].set_index("prompt")["dloss"]
    network = copy.deepcopy(plain_twin(study.model))

    def loss(prompt):
        ids = study.tokens[prompt][:12]
        with torch.no_grad():
            logits = network(input_ids=ids[None], use_cache=False).logits[0]
        return float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:]))

    assert intact.tolist() == pytest.approx([loss(5), loss(2)], abs=1e-4)
    for layer, head in busy[:2]:
        network.model.layers[layer].self_attn.o_proj.weight.data[:, 16 * head : 16 * head + 16] = 0
    assert rise[[5, 2]].tolist() == pytest.approx([loss(5) - intact[0], loss(2) - intact[1]], abs=1e-4)
    assert rise.abs().min() > 1e-2


def test_the_scores_without_heads_are_those_of_a_model_without_them(planted):
    study, _ = planted
    busy = [(4, 3), *((layer, head) for layer in range(3) for head in range(4))]
    rankings = {head_zeroing.IDLE: busy, head_zeroing.SINKS: busy}
    found = head_benchmarks.scores_without_heads(study, rankings, ["induction"], draws=1, items=3)
    own = found[found["heads"] == head_zeroing.IDLE]
    data = language_data(study.model, "", n_texts=3, n_tokens=128)
    asked = make_questions(BENCHMARKS["induction"], None, data, vocabulary=200, limit=3).requests
    network = copy.deepcopy(plain_twin(study.model))

    def loss(context, continuation):
        ids = torch.tensor([*context, *continuation])
        with torch.no_grad():
            logits = network(input_ids=ids[None], use_cache=False).logits[0]
        return float(torch.nn.functional.cross_entropy(logits[len(context) - 1 : -1], ids[len(context) :]))

    assert own["intact"].tolist() == pytest.approx([loss(*each) for each in asked], abs=1e-4)
    network.model.layers[4].self_attn.o_proj.weight.data[:, 48:64] = 0
    assert own["value"].tolist() == pytest.approx([loss(*each) for each in asked], abs=1e-4)
    assert (own["value"] - own["intact"]).abs().min() > 1e-3
    assert own["n_heads"].tolist() == [1, 1, 1]


def test_changes_of_scores_are_averaged_by_hand():
    scores = pd.DataFrame({"benchmark": "copy", "heads": "idlest", "draw": 0, "item": ["0", "1", "2"], "intact": 0.5})
    changes = head_benchmarks.changes_by_heads(scores.assign(value=[0.5, 0.6, 0.7])).iloc[0]
    assert (changes["intact"], changes["mean"]) == (0.5, pytest.approx(0.1))
    assert changes["low"] == pytest.approx(0.1 - 4.303 * 0.1 / 3**0.5, abs=1e-3)  # Student's t of 2 degrees of freedom


def test_what_a_model_lacks_is_left_out_and_told():
    study = melens.study(other_model("jetmoe"), [torch.arange(10, 30), torch.arange(11, 31)])
    found = melens.analysis.heads(study, entropy_tokens=64)
    assert list(found.figures) == ["head_map"]
    assert "value vectors" in found.metrics.values_why_not
    assert found.metrics.outputs_why_not == found.metrics.zeroing_why_not
    assert found.metrics.entropy_why_not == "No prompt has 64 tokens (exp.entropy_tokens)."
    assert found.claims["verdict"].eq("not measured").all()


HYBRID = SMALL | {"layer_types": ["conv", "full_attention", "conv"]}


@pytest.mark.parametrize(
    ("model_type", "config", "layers", "lacks"),
    [
        ("lfm2", HYBRID, [1], []),
        ("gpt_oss", OTHERS["gpt_oss"], [0, 1, 2], []),  # learned sinks and sliding windows
        ("deepseek_v3", LATENT, [0, 1, 2], ["values_why_not"]),
    ],
)
def test_heads_of_other_kinds_are_measured_where_they_are(model_type, config, layers, lacks):
    model = melens.load_model("random", model_type=model_type, config=config)
    study = melens.study(model, [torch.arange(at, at + 14) for at in (10, 30, 50)])
    found = melens.analysis.heads(study, shares=[0.5], draws=1, entropy_tokens=12, max_tokens=12)
    table = found.tables["heads"]
    assert table["layer"].unique().tolist() == layers
    assert table.groupby("layer")["head"].nunique().eq(4).all()
    measured = {"sink_mass", "output_ratio", "entropy"} | ({"value_ratio"} if not lacks else set())
    assert not table[[*measured]].isna().any().any()
    reasons = {name for name, told in found.metrics.plain().items() if name.endswith("_why_not") and told}
    assert reasons >= set(lacks)
    assert "outputs_why_not" not in reasons
    assert len(found.figures["head_map"].plot.data) == len(measured)
    assert found.figures["head_map"].plot.data[0].x == tuple(range(3))


# --- Claims -----------------------------------------------------------------------------------------------------------

DRAIN = {"value_drain": 0.3, "value_drain_interval": (0.2, 0.4), "value_drain_share": 0.9}
DORMANT_SINKS = {
    "sink_output": 0.4, "sink_output_interval": (0.3, 0.5), "sink_heads": 90, "compared_heads": 27, "overlap": 9,
    "overlap_by_chance": 2.7, "overlap_p": 0.001, "rank_correlation": -0.3, "rank_correlation_interval": (-0.4, -0.2),
}  # fmt: skip
BUSY_SINKS = DORMANT_SINKS | {"sink_output": 0.7, "sink_output_interval": (0.6, 0.8)}
ZEROED = {
    "dloss_idle_tenth": 0.005, "dloss_idle_tenth_interval": (0.001, 0.009), "dloss_random": {"0.1": 0.5},
    "dloss_idle_less_random": -0.4, "dloss_idle_less_random_interval": (-0.7, -0.1),
}  # fmt: skip

COSTLY = ZEROED | {"dloss_idle_tenth": 0.1, "dloss_idle_tenth_interval": (0.05, 0.15)}
WHOLE = DRAIN | {"value_drain": 0.6, "value_drain_interval": (0.5, 0.7)}


@pytest.mark.parametrize(
    ("claim", "metrics", "expected"),
    [
        ("values-drain", DRAIN, "holds"),
        ("values-drain", DRAIN | {"value_drain_interval": (0.2, 0.51)}, "holds in part"),
        ("values-drain", WHOLE, "holds in part"),
        ("values-drain", WHOLE | {"value_drain_share": 0.4}, "does not hold"),
        ("values-drain", {"values_why_not": "No values."}, "not measured"),
        ("sinks-dormant", DORMANT_SINKS, "holds"),
        ("sinks-dormant", BUSY_SINKS, "holds in part"),
        (
            "sinks-dormant",
            BUSY_SINKS | {"rank_correlation_interval": (-0.6, 0.01)},
            "does not hold",
        ),
        ("sinks-dormant", DORMANT_SINKS | {"sink_heads": 26}, "not measured"),
        ("sinks-dormant", {"outputs_why_not": "No outputs."}, "not measured"),
        ("idle-harmless", ZEROED, "holds"),
        ("idle-harmless", ZEROED | {"dloss_idle_tenth_interval": (0.001, 0.011)}, "holds in part"),
        ("idle-harmless", COSTLY, "holds in part"),
        (
            "idle-harmless",
            COSTLY | {"dloss_idle_less_random_interval": (-0.7, 0.1)},
            "does not hold",
        ),
        ("idle-harmless", ZEROED | {"dloss_random": {"0.1": 0.01}}, "not measured"),  # no heads matter
        ("idle-harmless", {"zeroing_why_not": "One prompt."}, "not measured"),
    ],
)
def test_what_is_said_of_heads_is_judged(claim, metrics, expected):
    result = {"experiment": "heads", "model": {"name": "m"}, "metrics": {"n_prompts": 9, "n_heads": 270} | metrics}
    assert melens.judge(result).set_index("id").verdict[claim] == expected
