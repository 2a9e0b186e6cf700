"""A table with trainings from a few items, its pairs and counts worked out on paper; masks compared in a notebook."""

import pandas as pd
import pytest
import torch
from handmade import study_by_hand

from melens import WeMask
from melens.benchmarks.catalog import BENCHMARKS
from melens.benchmarks.comparison import ScoreMetrics, benchmark, describe_requests, judge_comparisons, judge_each_worse
from melens.benchmarks.evaluation import MaskConfiguration
from melens.benchmarks.language import LanguageData
from melens.benchmarks.options import BenchmarkOptions
from melens.benchmarks.training_table import ScoredSet, training_table
from melens.data.chat import Chat
from melens.errors import MelensError
from melens.report.result import Metrics, Result
from melens.training.history import TrainingHistory, average_histories, draw_histories, trainings

N = 40
SHARES = {  # of right answers among 40, by row
    ("base", "base", 0.0): 0.0,
    ("SFT", "plain", 0.0): 0.25,
    ("TF 0.1", "inference", 0.1): 0.5,
    ("TF 0.3", "inference", 0.3): 0.0,
    ("WeMask 0.1", "training", 0.1): 0.75,
    ("headwise", "gates", 0.0): 0.25,
}


TASKS = ("piqa", "mathqa", "openbookqa")


def items(n_trainings=3, tasks=TASKS):
    rows = [
        {"mask": mask, "kind": kind, "rate": rate, "item": str(item), "value": float(item < share * N), "task": task}
        | {"training": training}
        for (mask, kind, rate), share in SHARES.items()
        for training in range(1 if kind == "base" else n_trainings)
        for task in tasks
        for item in range(N)
    ]
    same = {"metric": "acc", "seed": 0, "unfinished": False}
    return pd.DataFrame(rows).assign(**same, chance=0.5, shown=True, higher_is_better=True)


def history_of(name):
    steps = {"step": [0, 2], "masked": False, "me_layer": 2, "magnification_there": 9.0, "sink_mass": 0.5}
    return TrainingHistory(name, pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]}), pd.DataFrame(steps))


def table_of(found):
    scored = ScoredSet("gsm8k", found, "SFT", "Zero-shot, log-likelihoods.", Chat(opened="<think>"))
    n_trainings = found["training"].nunique()
    return training_table(study_by_hand(2), 7, "sft", [scored], [history_of("SFT")] * n_trainings, left_out=["mmlu"])


def test_trainings_are_compared_row_by_row():
    result = table_of(items())
    pairs = result.tables["table_pairs"].query("task == 'piqa'").set_index(["kind", "reference"])["difference"]
    assert pairs.to_dict() == {  # at the same rate alone, and with every gate
        ("training over inference", "TF 0.1"): pytest.approx(0.75 - 0.5),
        ("training over gates", "headwise"): pytest.approx(0.75 - 0.25),
    }
    scores = result.tables["table_scores"].query("task == 'piqa'").set_index("mask")
    assert scores["difference"].drop("SFT").to_dict() == pytest.approx(
        {"base": -0.25, "TF 0.1": 0.25, "TF 0.3": -0.25, "WeMask 0.1": 0.5, "headwise": 0.0}
    )
    metrics = result.metrics
    told = {name: metrics.compared[name] for name in ("inference", "training", "training over gates")}
    told = {name: (counts["all"], counts["better"], counts["worse"], counts["tasks"]) for name, counts in told.items()}
    assert told == {"inference": (6, 3, 3, 3), "training": (3, 3, 0, 3), "training over gates": (3, 3, 0, 3)}
    assert (metrics.n_compared, metrics.n_shown, metrics.left_out) == (15, 12, ["mmlu"])
    # 20 of 40 items differ: a standard error of 0.0801, and t of 39 degrees of freedom is 2.0227
    assert metrics.reach["training"] == pytest.approx(2.0227 * 0.0801, abs=1e-4)
    assert metrics.thinking == "on (the chat template opens a thought)"
    verdicts = result.claims.set_index("id")["verdict"]
    assert verdicts["training-over-none"] == "holds"
    assert verdicts["inference-over-none"] == "does not hold"
    assert {"table", "table_differences", "training_loss", "training_trace"} == set(result.figures)
    assert "SFT (mean of 3 trainings): loss from 2 to 1." in result.figures["training_loss"].observed
    assert "over items and trainings" in result.documents["table.md"]


@pytest.mark.parametrize(("n_trainings", "said"), [(1, "1 training"), (2, "2 trainings")])
def test_one_or_two_trainings_get_no_verdict_and_every_row_says_so(n_trainings, said):
    result = table_of(items(n_trainings))
    document = result.documents["table.md"]
    rows = [line for line in document.splitlines() if line.startswith("| ") and "0." in line]
    assert len(rows) == len(SHARES)
    assert all(row.count(said) == len(TASKS) for row in rows)
    assert "†" not in document
    assert "15 differences to SFT without a mask have no verdict: fewer than 3 trainings" in document
    assert (result.metrics.n_compared, result.metrics.n_shown) == (0, 0)
    claims = result.claims.set_index("id")
    assert set(claims["verdict"]) == {"not measured"}
    assert claims.loc["training-over-none", "note"] == "No comparison was tested: 3 have too few trainings."
    assert claims.loc["training-over-none", "former_verdict"] == "holds"  # over items alone
    assert any(f"no verdict from {said}, of 3 that it takes" in row[-1] for row in result.findings)
    assert not any("nan" in text for row in result.findings for text in row)
    assert result.tables["table_scores"][["p", "difference_low", "difference_high"]].isna().all(axis=None)


@pytest.mark.parametrize(("n", "said"), [(1, "Curves of one training"), (2, "Curves of two trainings"), (3, None)])
def test_curves_of_one_or_two_trainings_also_differ_by_chance(n, said):
    histories = average_histories([history_of(name) for name in ("SFT", "WeMask") for _ in range(n)])
    observed = draw_histories(histories, "", 2)["training_loss"].observed
    assert observed.endswith(f"{said} also differ by chance." if said else "loss from 2 to 1.")


def test_trainings_are_drawn_side_by_side_from_their_results():
    own = history_of("")
    tables = {"training_log": own.log, "training_trace": own.inspections}
    plain, masked = (Result("sft", {"name": "tiny"}, Metrics(me_layer=2), tables) for _ in range(2))
    together = trainings({"plain": plain, "WeMask": masked})
    assert [name for name, _ in together.findings] == ["plain", "WeMask"]
    assert {trace.name for trace in together.figures["training_loss"].plot.data} == {"plain", "WeMask"}
    assert "2 of SFT" in together.figures["training_loss"].plot.layout.title.text
    with pytest.raises(MelensError, match="'b' is a result of sinks; trainings takes those of trainings"):
        trainings({"a": plain, "b": Result("sinks", {}, Metrics())})
    with pytest.raises(MelensError, match="There are no trainings to draw"):
        trainings({})


def test_a_table_needs_neither_pairs_nor_histories():
    found = items()
    found = found[found["kind"].isin(["base", "plain", "training"])]
    result = training_table(study_by_hand(2), 7, "sft", [ScoredSet("gsm8k", found, "SFT", "", None)])
    assert result.tables["table_pairs"].empty
    assert sorted(result.figures) == ["table", "table_differences"]


def test_a_row_trained_once_is_not_compared_with_one_trained_thrice():
    found = items()
    once = found[(found["kind"] != "training") | (found["training"] == 0)]
    with pytest.raises(MelensError, match=r"the row 'WeMask 0.1' has the trainings \[0\], but 'SFT' has \[0, 1, 2\]"):
        table_of(once)


def test_what_one_benchmark_shows_holds_in_part():
    claims = table_of(items(tasks=TASKS[:1])).claims.set_index("id").loc["training-over-none"]
    assert (claims["verdict"], claims["former_verdict"]) == ("holds in part", "holds")
    assert "They are of 1 of the 3 benchmarks that it takes." in claims["note"]


@pytest.mark.parametrize(
    ("better", "worse", "n", "tasks", "verdict"),
    [
        (4, 0, 7, 3, "holds"),
        (4, 0, 7, 2, "holds in part"),
        (2, 0, 4, 3, "holds in part"),
        (4, 1, 7, 3, "holds in part"),
        (1, 1, 2, 2, "does not hold"),
    ],
)
def test_most_comparisons_are_more_than_half_of_at_least_three_benchmarks(better, worse, n, tasks, verdict):
    counts = {"all": n, "better": better, "worse": worse, "tasks": tasks}
    judged = judge_comparisons(ScoreMetrics(compared={"training": counts}, reach={"training": 0.1}), "training")
    assert (judged.verdict, judged.value) == (verdict, pytest.approx(better / n))
    assert "would not be seen" not in judged.note


def test_of_two_kinds_of_masks_the_one_that_harms_less_is_told():
    counts = {"all": 4, "better": 0, "tasks": 4}
    judged = judge_each_worse(
        ScoreMetrics(compared={"random": counts | {"worse": 1}, "magnitude": counts | {"worse": 4}}),
        "random",
        "magnitude",
    )
    assert (judged.verdict, judged.value) == ("holds in part", 0.25)
    assert judged.note == (
        "Random masks: 0 better, 1 worse, 3 not shown. Magnitude masks: 0 better, 4 worse, 0 not shown."
    )


def test_where_nothing_is_shown_it_is_said_what_could_have_been():
    counts = {"all": 4, "better": 0, "worse": 0, "tasks": 4, "too few items": 2}
    judged = judge_comparisons(ScoreMetrics(compared={"training": counts}, reach={"training": 0.034}), "training")
    assert judged.verdict == "does not hold"
    assert judged.note == (
        "0 better, 0 worse, 4 not shown. Not tested: 2 have too few items. Their intervals reach 0.034 to either side: "
        "less would not be seen."
    )


def test_masks_are_compared_without_hydra():
    study = study_by_hand(2)
    texts = torch.randint(1, 64, (7, 20), generator=torch.Generator().manual_seed(0))
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


def test_so_few_texts_say_that_they_show_nothing():
    study, texts = study_by_hand(2), torch.randint(1, 64, (4, 20), generator=torch.Generator().manual_seed(0))
    masks = [MaskConfiguration(f"rate {rate}", WeMask(rate, start=3).on(study.model), "paper") for rate in (0.25, 0.5)]
    result = benchmark(study, {"perplexity": [MaskConfiguration("no mask"), *masks]}, data=LanguageData(texts))
    told = {row[0]: row[1:] for row in result.findings}
    assert "; n=" not in told["perplexity, loss: best rate of paper"][1]
    assert "(n=2)" in told["perplexity, loss: best rate of paper"][1]
    assert "no verdict, as 4 items give no p below 0.05 here" in told["perplexity, loss: rate 0.5"][1]
    assert "so few items give no p below 0.05 in perplexity (n=4)" in told["in all"][0]
    assert not any("nan" in text for texts in told.values() for text in texts)
    weight = result.claims.set_index("id").loc["scores-weight-better"]
    assert (weight["verdict"], weight["former_verdict"]) == ("not measured", "does not hold")
    assert "benchmark_differences" in result.figures


def test_a_caption_says_how_models_were_scored():
    piqa, gsm8k, perplexity = (BENCHMARKS[name] for name in ("piqa", "gsm8k", "perplexity"))
    plain = describe_requests([piqa, gsm8k], BenchmarkOptions(), None)
    assert plain == "Zero-shot, log-likelihoods, or answers written greedily."
    options = BenchmarkOptions(generates=True, limit=5, judge="org/judge")
    assert describe_requests([piqa, perplexity], options, Chat("thinking", True), "block 3") == (
        "Zero-shot, log-likelihoods, or answers written. Thinking: on (thinking=true). Masked: block 3. The first 5 "
        "items of each. Refusals judged by org/judge."
    )
