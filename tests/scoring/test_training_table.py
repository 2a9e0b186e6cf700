"""A table with trainings from a few items, its pairs and counts worked out on paper; masks compared in a notebook."""

import pandas as pd
import pytest
import torch
from handmade import study_by_hand

from melens import WeMask
from melens.benchmarks.catalog import BENCHMARKS
from melens.benchmarks.comparison import ScoreMetrics, benchmark, describe_requests, judge_comparisons
from melens.benchmarks.evaluation import MaskConfiguration
from melens.benchmarks.language import LanguageData
from melens.benchmarks.options import BenchmarkOptions
from melens.benchmarks.training_table import ScoredSet, training_table
from melens.data.chat import Chat
from melens.training.history import TrainingHistory

N = 40
SHARES = {  # of right answers among 40, by row
    ("base", "base", 0.0): 0.0,
    ("SFT", "plain", 0.0): 0.25,
    ("TF 0.1", "inference", 0.1): 0.5,
    ("TF 0.3", "inference", 0.3): 0.0,
    ("WeMask 0.1", "training", 0.1): 0.75,
    ("headwise", "gates", 0.0): 0.25,
}


def items():
    rows = [
        {"mask": mask, "kind": kind, "rate": rate, "item": str(item), "value": float(item < share * N)}
        for (mask, kind, rate), share in SHARES.items()
        for item in range(N)
    ]
    same = {"task": "piqa", "metric": "acc", "seed": 0, "training": 0, "unfinished": False}
    return pd.DataFrame(rows).assign(**same, chance=0.5, shown=True, higher_is_better=True)


def test_trainings_are_compared_row_by_row():
    history = TrainingHistory(
        "SFT",
        pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]}),
        pd.DataFrame({"step": [0, 2], "masked": False, "me_layer": 2, "magnification_there": 9.0, "sink_mass": 0.5}),
    )
    scored = ScoredSet("gsm8k", items(), "SFT", "Zero-shot, log-likelihoods.", Chat(opened="<think>"))
    result = training_table(study_by_hand(2), 7, "sft", [scored], [history], left_out=["mmlu"])
    pairs = result.tables["table_pairs"].set_index(["kind", "reference"])["difference"]
    assert pairs.to_dict() == {  # at the same rate alone, and with every gate
        ("training over inference", "TF 0.1"): pytest.approx(0.75 - 0.5),
        ("training over gates", "headwise"): pytest.approx(0.75 - 0.25),
    }
    scores = result.tables["table_scores"].set_index("mask")
    assert scores["difference"].drop("SFT").to_dict() == pytest.approx(
        {"base": -0.25, "TF 0.1": 0.25, "TF 0.3": -0.25, "WeMask 0.1": 0.5, "headwise": 0.0}
    )
    metrics = result.metrics
    assert metrics.compared["inference"] == {"all": 2, "better": 1, "worse": 1}
    assert metrics.compared["training"] == {"all": 1, "better": 1, "worse": 0}
    assert metrics.compared["training over gates"] == {"all": 1, "better": 1, "worse": 0}
    assert (metrics.n_compared, metrics.n_shown, metrics.left_out) == (5, 4, ["mmlu"])
    assert metrics.thinking == "on (the chat template opens a thought)"
    verdicts = result.claims.set_index("id")["verdict"]
    assert verdicts["training-over-none"] == "holds"
    assert verdicts["inference-over-none"] == "does not hold"
    assert {"table", "table_differences", "training_loss", "training_trace"} == set(result.figures)


@pytest.mark.parametrize(
    ("better", "worse", "n", "verdict"),
    [(4, 0, 7, "holds"), (2, 0, 4, "holds in part"), (4, 1, 7, "holds in part"), (1, 1, 2, "does not hold")],
)
def test_most_comparisons_are_more_than_half(better, worse, n, verdict):
    metrics = ScoreMetrics(compared={"training": {"all": n, "better": better, "worse": worse}})
    judged = judge_comparisons(metrics, "training")
    assert (judged.verdict, judged.value) == (verdict, pytest.approx(better / n))


def test_masks_are_compared_without_hydra():
    study = study_by_hand(2)
    texts = torch.randint(1, 64, (4, 20), generator=torch.Generator().manual_seed(0))
    mask = WeMask(0.5, start=3).on(study.model)
    configurations = [MaskConfiguration("no mask"), MaskConfiguration("paper", mask, "paper")]
    result = benchmark(study, {"perplexity": configurations, "copy": configurations}, data=LanguageData(texts))
    assert (result.metrics.tasks, result.metrics.mode) == (["perplexity", "copy"], "loglikelihood")
    assert result.metrics.compared["weight"]["all"] == 2
    assert set(result.metrics.masks["copy"]) == {"paper"}
    own = result.tables["benchmark_items"].query("task == 'perplexity'").pivot(index="item", columns="mask")["value"]
    scores = result.tables["benchmark_scores"].query("task == 'perplexity'").set_index("mask")
    assert scores.loc["paper", "difference"] == pytest.approx((own["paper"] - own["no mask"]).mean())
    assert set(result.figures) == {"benchmark_table", "benchmark_differences"}


def test_a_caption_says_how_models_were_scored():
    piqa, gsm8k, perplexity = (BENCHMARKS[name] for name in ("piqa", "gsm8k", "perplexity"))
    plain = describe_requests([piqa, gsm8k], BenchmarkOptions(), None)
    assert plain == "Zero-shot, log-likelihoods, or answers written greedily."
    options = BenchmarkOptions(generates=True, limit=5, judge="org/judge")
    assert describe_requests([piqa, perplexity], options, Chat("thinking", True), "block 3") == (
        "Zero-shot, log-likelihoods, or answers written. Thinking: on (thinking=true). Masked: block 3. The first 5 "
        "items of each. Refusals judged by org/judge."
    )
