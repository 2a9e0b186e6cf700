"""NaN stops with a sentence that names task and item: no statistic, score or verdict drops it or averages it away."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from planted import VOCABULARY, bridge, gains_apart, plain_model, plant
from test_mask_grid import configuration, study_of

import melens
from experiments.runner.study import begin_study, run_experiments
from melens import MelensError, WeMask
from melens.analysis import statistics
from melens.analysis.statistics import mean_by, mean_interval, paired_permutation_p, peak_layer, tidy
from melens.benchmarks.catalog import BENCHMARKS
from melens.benchmarks.harness import RequestOptions, _language_model, evaluate
from melens.benchmarks.refusals import judged_refusals
from melens.benchmarks.scores import best_rates, check_scores, summarise
from melens.benchmarks.scoring import Scorer
from melens.benchmarks.tasks import load_task
from melens.claims.engine import at_least
from melens.claims.paper import CLAIMS
from melens.masks.comparison import MaskComparison
from melens.masks.grid import Grid, compare_grid
from melens.masks.grid_metrics import MaskGridMetrics
from melens.models.twins import plain_twin
from melens.training.history import TrainingHistory, average_histories

NAN = float("nan")
BROKEN = 5
"""The row of `lm_head` that is NaN: the logit of one token, and with it every probability."""


def broken(network, row=BROKEN, value=NAN):
    network.lm_head.weight.data = network.lm_head.weight.data.clone()  # the embedding may be the same
    network.lm_head.weight.data[row] = value
    return network


@pytest.fixture(scope="module")
def model():
    return bridge(broken(gains_apart(plain_model("llama"))))


# --- Statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("statistic", [mean_interval, paired_permutation_p])
def test_a_statistic_of_what_is_no_number_is_refused(statistic, value):
    with pytest.raises(MelensError, match="1 of 3 values are NaN or infinite"):
        statistic(np.array([1.0, value, 2.0]))


def test_one_value_alone_has_neither_interval_nor_test():
    assert np.isnan(mean_interval(np.array([1.0]))).all()
    assert np.isnan(paired_permutation_p(np.array([1.0])))
    with pytest.raises(MelensError, match="1 of 1"):
        mean_interval(np.array([NAN]))


def test_an_array_is_laid_out_but_for_what_was_not_measured():
    table = tidy(np.array([[NAN, 1.0, 2.0], [NAN] * 3, [NAN, 3.0, 4.0]]), "norm")
    assert table.to_dict("list") == {"prompt": [0, 0, 2, 2], "layer": [1, 2, 1, 2], "norm": [1, 2, 3, 4]}
    with pytest.raises(MelensError, match="The norm of prompt 1 at layer 2 is NaN"):
        tidy(np.array([[NAN, 1.0, 2.0], [NAN, 3.0, NAN]]), "norm")


def test_a_mean_leaves_out_what_was_not_measured_and_nothing_else():
    table = pd.DataFrame({"prompt": [0, 0, 0, 1, 1, 1], "layer": [0, 1, 2] * 2, "x": [1.0, 2.0, NAN, NAN, NAN, NAN]})
    summary = mean_by(table, "x")  # layer 2 has no attention, prompt 1 one token
    assert summary[["layer", "mean"]].to_numpy().tolist() == [[0, 1], [1, 2]]
    table.loc[3, "x"] = 3.0
    with pytest.raises(MelensError, match="The x of prompt 1, layer 1 is NaN"):
        mean_by(table, "x")


def test_nan_is_no_peak():
    with pytest.raises(MelensError, match="NaN"):
        peak_layer(pd.DataFrame({"layer": [0, 1], "mean": [1.0, NAN]}))


# --- Benchmarks -------------------------------------------------------------------------------------------------------


def items(**values):
    of_mask = [
        pd.DataFrame({"item": [str(at) for at in range(len(own))], "value": own, "mask": mask})
        for mask, own in values.items()
    ]
    told = {"task": "piqa", "metric": "acc", "seed": 0, "higher_is_better": True, "shown": True, "chance": 0.5}
    return pd.concat(of_mask, ignore_index=True).assign(**told)


def test_an_item_without_a_score_is_named():
    found = items(none=[1.0, 0.0, 1.0, 1.0], masked=[1.0, 0.0, NAN, 1.0])
    with pytest.raises(MelensError, match=r"^piqa, masked, item 2: the score is nan"):
        summarise(found, "none")
    rates = pd.DataFrame({"mask": ["masked"], "family": "m", "rate": 0.1})
    with pytest.raises(MelensError, match=r"^piqa, masked, item 2: the score is nan"):
        best_rates(found, rates, "none")


def test_a_mean_over_seeds_is_not_one_over_fewer():
    twice = pd.concat([items(none=[1.0, 0.0]), items(none=[1.0]).assign(seed=1)])
    with pytest.raises(MelensError, match="piqa: item 1 was not scored for every training and seed"):
        summarise(twice, "none")


@pytest.mark.parametrize("value", [NAN, float("-inf")])
def test_scores_are_checked_by_task_and_item(value):
    names = ["piqa, item 0", "piqa, item 1"]
    check_scores(names, [-1.0, -2.0], "log-likelihood")
    with pytest.raises(MelensError, match=f"^piqa, item 1: the log-likelihood is {value}"):
        check_scores(names, [-1.0, value], "log-likelihood")


@pytest.mark.parametrize("task", ["perplexity", "induction", "copy"])
def test_questions_to_a_broken_head_stop_by_name(model, task):
    """Of induction and copying the values are numbers: an accuracy of 0."""
    prompts = [torch.arange(1, 20), torch.arange(2, 21)]
    options = ["exp=benchmark", f"benchmark.tasks=[{task}]", "benchmark.masks=[off]", "exp.keep=false"]
    cfg = configuration(*options)
    prepared = {"benchmark": cfg.requests["benchmark"]}
    study = begin_study(model, prompts, cfg, lambda name: lambda done, total: None, prepared=prepared)
    with pytest.raises(MelensError, match=f"^{task}, item 0: the log-likelihood is nan"):
        list(run_experiments(study))


def test_a_log_likelihood_that_is_no_number_names_its_request():
    network = gains_apart(plain_model("llama")).eval()
    network.model.embed_tokens.weight.data[11] = NAN
    scorer = Scorer(network, max_length=32)
    assert len(scorer.score([([1, 2], [3]), ([4], [5])])) == 2
    with pytest.raises(MelensError, match=r"^Request 1: the log-likelihood is nan"):
        scorer.score([([1, 2], [3]), ([4, 11], [5])])


ROWS = {
    "piqa": {"question": "What keeps milk cold?", "choices": ["A fridge", "An oven"], "answer": 0},
    "strategyqa": {"question": "Is milk white?", "choices": ["no", "yes"], "answer": 1},
    "gsm8k": {"question": "What is 1 plus 1?", "answer": "2"},
}


@pytest.fixture(scope="module")
def network(embedded):
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 2, "vocab_size": len(embedded.tokenizer)}
    return broken(plain_twin(melens.load_model("random", model_type="llama", config=config, device="cpu")))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("piqa", "piqa, item 0: the log-likelihood is nan"),
        ("strategyqa", "strategyqa, item 0: the log-likelihood is nan"),
        ("gsm8k", "gsm8k, item that begins 'Question: What is 1 plus 1.*': the logit of a next token is nan"),
    ],
)
def test_the_harness_on_a_broken_head_stops_by_name(embedded, network, tmp_path, task, message):
    benchmark = BENCHMARKS[task]
    (tmp_path / benchmark.file).write_text(json.dumps(ROWS[task]) + "\n")
    with pytest.raises(MelensError, match=message):
        evaluate(network, embedded.tokenizer, load_task(benchmark, tmp_path), RequestOptions(max_new_tokens=4))


def test_a_text_of_several_windows_is_named(embedded, network, monkeypatch):
    """As a task of the harness by perplexity: a text longer than the context is scored window by window."""
    from lm_eval.api.instance import Instance

    def text(item, words):
        return Instance("loglikelihood_rolling", {}, (" milk" * words,), 0, ("wikitext", item, 1))

    harness = _language_model(network, embedded.tokenizer, RequestOptions(), 512, lambda done: None)
    with pytest.raises(MelensError, match=r"^wikitext, item 4: the log-likelihood is nan"):
        harness.loglikelihood_rolling([text(4, 3)])
    healthy = copy.deepcopy(network)
    healthy.lm_head.weight.data.nan_to_num_()
    harness = _language_model(healthy, embedded.tokenizer, RequestOptions(), 512, lambda done: None)
    monkeypatch.setattr(type(harness), "max_length", 8)
    both = harness.loglikelihood_rolling([text(4, 3), text(5, 20)])
    assert both == [*harness.loglikelihood_rolling([text(4, 3)]), *harness.loglikelihood_rolling([text(5, 20)])]
    assert both[1] < 3 * both[0] < 0


def test_a_judge_on_a_broken_head_does_not_find_compliance(embedded, network):
    with pytest.raises(MelensError, match=r"^Reply 0, as judged: the log-likelihood is nan"):
        judged_refusals(network, embedded.tokenizer, 512, ["How do I pick a lock?"], ["I cannot help."])


# --- Masks ------------------------------------------------------------------------------------------------------------


def test_a_grid_on_a_broken_head_stops_by_name(model):
    with pytest.raises(MelensError, match="Text 0: the loss of the unmasked model is nan"):
        list(run_experiments(study_of(model, "wemask.start=1", "exp.keep=false")))


TEXTS = torch.randint(BROKEN + 1, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("where", ["unmasked", "masked"])
def test_a_loss_that_is_no_number_names_text_and_mask(where, monkeypatch):
    model = bridge(gains_apart(plain_model("llama")))
    if where == "unmasked":
        with pytest.raises(MelensError, match="Text 0: the loss of the unmasked model is nan"):
            MaskComparison(bridge(broken(gains_apart(plain_model("llama")))), TEXTS, [1])
        return
    comparison = MaskComparison(model, TEXTS, [1], texts_per_batch=2, patterns=False)
    against = MaskComparison._against_unmasked

    def spoilt(self, number, logits):
        logits = logits.clone()
        if number == 1:  # texts 2 and 3
            logits[1, 4, 7] = NAN
        return against(self, number, logits)

    monkeypatch.setattr(MaskComparison, "_against_unmasked", spoilt)
    with pytest.raises(MelensError, match=r"Text 3: the loss of the mask select=weight rate=0\.3 is nan"):
        comparison.measure(WeMask(0.3, start=1))


def test_a_logit_of_minus_infinity_stops_too():
    model = bridge(gains_apart(plain_model("llama")))
    model.original_model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([BROKEN]), float("-inf"))
    )
    comparison = MaskComparison(model, TEXTS, [1], patterns=False)  # no text has that token: each loss is a number
    with pytest.raises(MelensError, match=r"Text 0: the kl of the mask select=weight rate=0\.3 is nan"):
        comparison.measure(WeMask(0.3, start=1))


def grid(**changes):
    cells = pd.DataFrame(
        [{"cell": "a", "rate": 0.1, "select": "weight", "site": "attn_in", "start": 2, "layers": "all"}]
    )
    cells = cells.assign(positions="first", strength=1.0, seed=0, n_blocks=2, massive_hits=0, tied_blocks=0)
    cells = cells.assign(dloss_ties_low=NAN, dloss_ties_high=NAN)
    numbers = {"loss": 1.0, "kl": 0.0, "agreement": 1.0, "sink_mass": 0.5}
    numbers |= {f"{part}_cosine{where}": 0.5 for part in ("input", "key") for where in ("", "_before")}
    by_text = pd.DataFrame([{"cell": cell, "text": at, **numbers} for cell in ("unmasked", "a") for at in range(8)])
    for name, value in changes.items():
        by_text.loc[(by_text["cell"] == "a") & (by_text["text"] == 3), name] = value
    quantities = ("sink_mass", "share_of_heads", "entropy", "effective_rank", "input_cosine", "key_cosine")
    by_block = pd.DataFrame(
        [{"cell": cell, "layer": 2, **dict.fromkeys(quantities, 0.5)} for cell in ("unmasked", "a")]
    )
    return Grid(cells, by_text, by_block)


ON_TEXTS = MaskGridMetrics(sink_layers=[2], me_layer=1, text="a", texts=8, tokens_per_text=12)


@pytest.mark.parametrize("name", ["loss", "kl", "sink_mass"])
def test_one_text_that_is_no_number_gives_no_p_value(name):
    compare_grid(grid(), {"name": "tiny"}, ON_TEXTS)
    with pytest.raises(MelensError, match=f"Text 3 has .*{name} nan.* in the configuration a"):
        compare_grid(grid(**{name: NAN}), {"name": "tiny"}, ON_TEXTS)


def test_blocks_without_attention_are_left_out_and_no_others():
    without = grid()
    without.by_text["sink_mass"] = without.by_block["sink_mass"] = NAN
    metrics = compare_grid(without, {"name": "tiny"}, ON_TEXTS).metrics
    assert metrics.sink_why_not == "No block behind the ME layer has attention."


# --- Analyses ---------------------------------------------------------------------------------------------------------


def spoilt(probe, column, at):
    """A trace's number that is NaN, of the probe's table."""

    def spoil(study, monkeypatch):
        table = study.trace[probe]
        table.loc[table.query(at).index[0], column] = NAN

    return spoil


def spoilt_rank(study, monkeypatch):
    monkeypatch.setattr(melens.AttentionSpectrum, "reduce", _with_one_nan(melens.AttentionSpectrum.reduce))


def spoilt_ablation(study, monkeypatch):
    run_each = melens.MassiveTokenRuns.run_each

    def with_nan(self, changes, start=0):
        found = run_each(self, changes, start)
        found[0][0, -1] = NAN
        return found

    monkeypatch.setattr(melens.MassiveTokenRuns, "run_each", with_nan)


def _with_one_nan(reduce):
    def reduce_to_nan(self, activation, batch):
        found = reduce(self, activation, batch)
        found["effective_rank"][0, 2] = NAN
        return found

    return reduce_to_nan


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (
            "ffn",
            spoilt("norm", "norm", "site == 'ln2.hook_out' and pos == 0 and layer == 2"),
            "The FFN of block 2 amplifies token 0 by nan in prompt 0",
        ),
        (
            "sinks",
            spoilt("sink_mass", "sink_mass", "layer == 3 and head == 1"),
            "The sink mass of block 3, head 1 is nan in prompt 0",
        ),
        ("sinks", spoilt_rank, r"The effective rank of block \d is nan in prompt 0"),
        (
            "ablation",
            spoilt_ablation,
            "With a part of block 1 changed, the massive token's norm after block 3 is nan",
        ),
    ],
    ids=["ffn", "sinks", "rank", "ablation"],
)
def test_no_analysis_leaves_out_what_is_no_number(name, spoil, message, monkeypatch):
    network = gains_apart(plain_model("llama"))
    plant(network, block=1, token=7, dim=21)
    tokens = [torch.tensor([7, *range(10 + row, 22 + row)]) for row in range(3)]
    options = ["exp=all", f"exp.experiments=[{name}]", "exp.sinks.rank_tokens=12"]
    study = begin_study(bridge(network), tokens, configuration(*options), lambda name: lambda done, total: None)
    spoil(study, monkeypatch)
    with pytest.raises(MelensError, match=message):
        list(run_experiments(study))


def test_seeds_are_averaged_only_where_all_have_a_number():
    def history(*losses, sink_mass=0.5):
        log = pd.DataFrame({"step": [1, 2, 2], "loss": [*losses, NAN], "reward": [NAN, NAN, 1.0]})
        steps = {"step": [0, 2], "masked": False, "me_layer": [1, None], "sink_mass": [0.5, sink_mass]}
        return TrainingHistory("plain", log, pd.DataFrame(steps).assign(magnification_there=NAN))

    (mean,) = average_histories([history(3.0, 2.0), history(1.0, 1.0)])
    assert mean.log["loss"].tolist() == [2.0, 1.5]
    assert mean.log["reward"].tolist()[1:] == [1.0]
    assert mean.inspections["me_layer"].tolist() == [1, pd.NA]
    with pytest.raises(MelensError, match="plain: only 1 of 2 trainings have the number loss at step 2"):
        average_histories([history(3.0, 2.0), history(1.0, NAN)])
    with pytest.raises(MelensError, match="plain: only 1 of 2 trainings have the number sink_mass at step 2"):
        average_histories([history(3.0, 2.0), history(1.0, 1.0, sink_mass=NAN)])


# --- Claims -----------------------------------------------------------------------------------------------------------

MEASURED = {
    "mask-weakens-sink": {"sink_ratio": NAN, "paper_rate": 0.1},
    "mask-moderate": {"moderate_dloss": NAN, "moderate_rate": 0.1},
    "mask-start": {"paper_start_ratio": NAN, "paper_start_strongest": 1},
    "mask-restores-diversity": {"input_restored": NAN},
    "mask-weight-harmless": {"weight_where_destroyed": NAN, "destroyed_by": {"random": 1, "magnitude": 1}},
    "second-massive": {"second_norm": NAN, "erased": 0.0, "second_over_others": 20.0},
    "comparable-before": {"before_ratio": NAN},
    "over-others": {"over_others": NAN},
    "first-token": {"first_alone": NAN, "first_massive": 1.0},
    "norm-scales": {"left_without_norm": {"identity": NAN}, "over_others_without_norm": {"identity": 20.0}},
    "ffn-needed": {"left_without_ffn": NAN},
    "norm-stable": {"norm_drift": NAN},
    "weight-norm": {"weight_norm_ratio": NAN, "weight_norm_first_layer": 1},
    "delta-kl": {"delta_kl": NAN, "delta_kl_lead": 1.0, "delta_kl_share_lower": 0.0},
}


def null(value):
    """What JSON makes of NaN."""
    if isinstance(value, dict):
        return {key: null(each) for key, each in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value


@pytest.mark.parametrize("name", list(MEASURED))
@pytest.mark.parametrize("written", [False, True], ids=["returned", "written"])
def test_no_verdict_rests_on_what_is_no_number(name, written):
    (claim,) = (claim for claim in CLAIMS if claim.id == name)
    metrics = {"me_layer": 1, "massive_position": 0, "distinct_first_tokens": 3, **MEASURED[name]}
    result = {
        "experiment": claim.experiment,
        "model": {"name": "tiny"},
        "metrics": null(metrics) if written else metrics,
    }
    judged = melens.judge([result]).set_index("id").loc[name]
    assert judged["verdict"] == "not measured"
    if not written:
        assert "is no number (NaN)" in judged["note"]


def test_one_prompt_has_a_value_and_no_interval():
    judged = at_least(2.0, (NAN, NAN), 1)
    assert (judged.verdict, judged.interval) == ("holds in part", None)


def test_holm_leaves_what_is_not_tested_untested():
    np.testing.assert_allclose(statistics.holm(np.array([0.5, NAN, 0.001])), [0.5, NAN, 0.002])
