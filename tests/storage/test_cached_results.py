"""What an experiment keeps is found again under all that decides it, and under nothing less."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from planted import FAMILIES, bridge, gains_apart, plain_model, plant
from test_cache import tokenizer
from test_mask_grid import configuration, study_of
from test_not_a_number import ON_TEXTS, grid
from written import write_result

import melens
from experiments import wemask
from experiments.options import compose_options
from experiments.options.training import training_request
from experiments.runner import study as of_run
from experiments.runner.jobs import jobs_of
from experiments.runner.registry import EXPERIMENTS
from experiments.runner.study import begin_study, run_experiments
from melens import WeMask
from melens.benchmarks import evaluation
from melens.benchmarks import tasks as task_definitions
from melens.benchmarks.catalog import BENCHMARKS
from melens.benchmarks.evaluation import Evaluator
from melens.benchmarks.harness import RequestOptions, evaluate
from melens.benchmarks.language import LanguageData
from melens.benchmarks.options import BenchmarkOptions
from melens.benchmarks.tasks import load_task
from melens.data.prompts import byte_tokenizer
from melens.masks import grid as grids
from melens.masks.comparison import MaskComparison
from melens.models.twins import plain_twin
from melens.report.result import Metrics, Result, plain
from melens.storage import cache
from melens.storage.cache import Store, store_for
from melens.storage.results import load_cached, load_result, save_result
from melens.training import runs
from melens.training.runs import training_store

TEXTS = torch.randint(10, 200, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "cache"))


def model_of(eps=1e-6):
    network = gains_apart(plain_model("llama"))
    network.config.rms_norm_eps = eps
    for name, module in network.named_modules():
        if name.endswith("norm"):
            module.variance_epsilon = eps
    return bridge(network)


def planted(family="llama"):
    network = gains_apart(plain_model(family))
    plant(network, block=1, token=1, dim=21)
    return network


# --- Traces and masks -------------------------------------------------------------------------------------------------


def test_another_rms_norm_eps_on_the_same_weights_is_measured_anew():
    def measured(eps):
        model = model_of(eps)
        store = store_for("masks", model.original_model, TEXTS)
        found = MaskComparison(model, TEXTS, [1], patterns=False, store=store)
        return found.shared, float(found.unmasked.loss.mean()), study_of(model).trace["norm"]["norm"].tolist()

    (_, loss_before, norms_before), (shared, loss, norms) = measured(1e-6), measured(10.0)
    assert not shared
    assert loss != loss_before
    assert norms != norms_before
    assert measured(10.0) == (True, loss, norms)


def test_a_kept_trace_is_found_again_and_one_that_is_damaged_is_made_anew(tmp_path, monkeypatch):
    model, traced = model_of(), []
    trace_of, load = melens.trace, melens.Trace.load
    monkeypatch.setattr(melens, "trace", lambda *told, **options: traced.append(told) or trace_of(*told, **options))
    norms = study_of(model).trace["norm"]
    (folder,) = (path for path in (tmp_path / "cache" / "traces").glob("*/*") if path.is_dir())
    assert study_of(model).trace["norm"].equals(norms)
    assert len(traced) == 1
    (folder / "norm.table.parquet").write_bytes(b"half")
    assert study_of(model).trace["norm"].equals(norms)
    assert len(traced) == 2
    assert load(folder)["norm"].equals(norms)


@pytest.mark.parametrize(
    "other",
    [{"texts": TEXTS.flip(1)}, {"texts_per_batch": 2}, {"short_texts": 1}, {"short_tokens": 6}, {"patterns": False}],
    ids=["texts", "batch", "short texts", "short tokens", "patterns"],
)
def test_an_unmasked_run_is_taken_for_the_same_texts_alone(tmp_path, other):
    model, store = model_of(), Store(tmp_path / "store")
    options = {"texts": TEXTS, "texts_per_batch": 4, "short_texts": 2, "short_tokens": 8}

    def shared(**changed):
        told = options | changed
        return MaskComparison(model, told.pop("texts"), [1], store=store, **told).shared

    assert [shared(), shared(), shared(**other)] == [False, True, False]


def test_jobs_of_other_options_are_not_put_into_one_grid(tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "grid_figures", lambda *of_grid: {})
    jobs = {}
    for number, (cell, dtype) in enumerate([("a", "float32"), ("b", "float32"), ("a", "bfloat16")]):
        measured = grid()
        for table in (measured.configurations, measured.by_text, measured.by_block):
            table["cell"] = table["cell"].replace("a", cell)
        given = {"model.dtype": dtype, "wemask.rate": number}
        config = {
            "model": {"name": "tiny", "dtype": dtype},
            "wemask": {"rate": number},
            "given": given,
            "typed": [*given],
        }
        folder = tmp_path / str(number)
        write_result(grids.compare_grid(measured, {"name": "tiny"}, ON_TEXTS), folder, config=config, duration=0.0)
        jobs[folder] = json.loads((folder / "result.json").read_text())
    merged = wemask.merge(jobs_of(jobs))
    names = ["cells-tiny-model.dtype=float32", "cells-tiny-model.dtype=bfloat16"]
    cells = [each.tables[name]["cell"].tolist() for each, name in zip(merged, names, strict=True)]
    assert cells == [["a", "b"], ["a"]]
    assert [each.model["name"] for each in merged] == ["tiny, model.dtype=float32", "tiny, model.dtype=bfloat16"]


# --- Several experiments ----------------------------------------------------------------------------------------------


def parts_of(model, *options, shift=0):
    """What the experiments of a run find, one by one."""
    cfg = compose_options("exp=all", "model=random", "exp.experiments=[ffn,predict]", *options)
    prompts = [torch.arange(1 + shift, 20), torch.arange(2 + shift, 21)]
    return run_experiments(begin_study(model, prompts, cfg, lambda name: lambda done, total: None))


def measured(*_):
    raise AssertionError("It was measured again.")


def run_by(monkeypatch, name, function):
    """Let a function run the experiment of a name."""
    monkeypatch.setitem(EXPERIMENTS, name, replace(EXPERIMENTS[name], run=function))


def same_but_for_nan(left, right):
    """JSON has no NaN: what was read has None there."""
    return type(left) is type(right) and plain(left.model_dump()) == plain(right.model_dump())


def counted(monkeypatch, name):
    """Return a list that grows whenever the experiment of a name is run."""
    ran, run = [], EXPERIMENTS[name].run
    run_by(monkeypatch, name, lambda *given: ran.append(given) or run(*given))
    return ran


def test_a_run_that_was_stopped_goes_on_with_what_it_has_not_done(monkeypatch):
    model = bridge(planted())

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        run_by(patch, "predict", stop)
        parts = parts_of(model)
        first = next(parts)
        with pytest.raises(KeyboardInterrupt):
            next(parts)
    with monkeypatch.context() as patch:
        run_by(patch, "ffn", measured)
        patch.setattr(melens, "trace", measured)
        found, second = parts_of(model)
        run_by(patch, "predict", measured)
        assert [part.metrics.measured_before for part in parts_of(model)] == [True, True]
    assert (found.metrics.measured_before, second.metrics.measured_before) == (True, False)
    assert same_but_for_nan(found.metrics.model_copy(update={"measured_before": False}), first.metrics)
    assert set(found.figures) == set(first.figures)
    assert second.metrics.ranks["response"] == 1


def test_what_an_experiment_found_is_kept_under_all_that_it_depends_on(monkeypatch):
    model, ran = bridge(planted()), counted(monkeypatch, "ffn")
    times = []
    for options in (
        (),
        (),
        ("exp.experiments=[ffn,direction]",),
        ("criterion.trailing_blocks=1",),
        ("seed=1",),
        ("exp.keep=false",),
    ):
        found = next(parts_of(model, *options))
        times.append(len(ran))
        assert found.metrics.measured_before == (times[-2:] == [times[-1]] * 2)
    assert times == [1, 1, 1, 2, 3, 4]


def test_other_prompts_and_other_weights_are_measured_anew(monkeypatch):
    network = planted()
    next(parts_of(bridge(network)))
    next(parts_of(bridge(network), shift=1))
    network.model.layers[0].mlp.up_proj.weight.data[5] *= 2
    next(parts_of(bridge(network)))
    run_by(monkeypatch, "ffn", measured)
    next(parts_of(bridge(network)))


@pytest.mark.parametrize(
    ("options", "n_traced"),
    [((), 1), (("criterion.trailing_blocks=1",), 1), (("exp.keep=false",), 2), (("max_batch_tokens=64",), 2)],
)
def test_one_experiment_begins_with_the_trace_of_an_earlier_run(monkeypatch, options, n_traced):
    model, prompts = bridge(planted()), [torch.arange(1, 20), torch.arange(2, 21)]
    traces, trace = [], melens.trace
    monkeypatch.setattr(melens, "trace", lambda *given, **named: traces.append(given) or trace(*given, **named))
    for own in ((), options):
        cfg = compose_options("exp=ffn", "model=random", *own)
        study = begin_study(model, prompts, cfg, lambda name: lambda done, total: None)
        assert len(study.trace["norm"])
    assert len(traces) == n_traced


def test_an_experiment_of_several_is_measured_anew_where_that_is_asked(monkeypatch):
    model, ran = bridge(planted()), counted(monkeypatch, "ffn")
    for options in ((), ("exp.ffn.keep=false",), ()):
        next(parts_of(model, *options))
    assert len(ran) == 2


def test_a_cached_result_names_no_class_but_one_of_ours(tmp_path):
    folder = tmp_path / "ffn"
    save_result(Result("ffn", {"name": "tiny"}, Metrics(me_layer=1, n_prompts=3)), folder)
    assert load_result(folder).metrics == Metrics(me_layer=1, n_prompts=3)
    content = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(content | {"metrics_class": ["http.server", "test"]}))
    with pytest.raises(ValueError, match=r"http\.server\.test is no class of metrics"):
        load_result(folder)
    assert load_cached(folder, load_result) is None
    assert not folder.exists()


def test_what_is_damaged_is_measured_anew_and_mended(tmp_path, monkeypatch):
    model = bridge(planted())
    before = next(parts_of(model))
    (folder,) = (tmp_path / "cache" / "experiments").glob("*/ffn-*")
    next(folder.glob("*.parquet")).write_bytes(b"half")
    again = next(parts_of(model))
    assert same_but_for_nan(again.metrics, before.metrics)
    run_by(monkeypatch, "ffn", measured)
    assert next(parts_of(model)).metrics.measured_before


def test_only_what_was_found_is_kept_and_not_what_reads_files_of_its_own(tmp_path, monkeypatch):
    run_by(monkeypatch, "predict", lambda *_: 1 / 0)
    run_by(monkeypatch, "wemask", lambda run, options: Result("wemask", run.trace.model, Metrics(n_prompts=7)))
    parts = parts_of(model_of(), "exp.experiments=[ablation,predict,wemask,ffn]")
    metrics = {part.experiment: part.metrics for part in parts}
    assert metrics["ablation"].not_applicable is not None  # this model has no massive activation
    assert metrics["predict"].failed
    assert metrics["wemask"].n_prompts == 7
    found = next(parts_of(model_of(), "exp.experiments=[wemask,ffn]", "exp.wemask.keep=false"))
    assert found.metrics.n_prompts == 7
    kept = [folder.name.split("-")[0] for folder in (tmp_path / "cache" / "experiments").glob("*/*")]
    assert kept == ["ffn"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ((), (True, True)),
        (("exp.keep=false",), (False, False)),
        (("exp.keep=false", "exp.wemask.keep=true"), (True, False)),
        (("exp.benchmark.keep=false",), (True, False)),
    ],
)
def test_what_an_experiment_keeps_of_its_own_goes_by_keep_of_all(given, kept):
    cfg = compose_options("exp=all", "model=random", "exp.experiments=[wemask,benchmark]", *given)
    assert tuple(options.is_kept for options in cfg.experiments.values()) == kept


def test_prompts_of_other_tasks_are_measured_anew(monkeypatch):
    model, ran = bridge(planted()), counted(monkeypatch, "ffn")
    cfg = compose_options("exp=all", "model=random", "exp.experiments=[ffn,predict]")
    prompts = [torch.arange(1, 20), torch.arange(2, 21)]
    study = begin_study(model, prompts, cfg, lambda name: lambda done, total: None)
    for task in ("maths", "maths", "logic"):
        told = replace(study.trace, prompts=study.trace.prompts.assign(task=task))
        next(run_experiments(replace(study, trace=told)))
    assert len(ran) == 2


@pytest.mark.parametrize("case", ["", "exp.keep=false", "read-only", "quantised"])
def test_a_run_is_said_to_go_on_where_something_is_kept(tmp_path, monkeypatch, case):
    kept = cache.RunCache()
    for module in (cache, of_run):
        monkeypatch.setattr(module, "RUN_CACHE", kept)
    if case == "read-only":
        (tmp_path / "cache").touch()  # no folder, so that none can be made in it
    if case == "quantised":
        monkeypatch.setattr(cache, "is_quantized", lambda network: True)
    for again in (False, True):
        next(parts_of(bridge(planted()), *[case] * case.startswith("exp")))
        assert kept.can_resume == (case == "")
        assert kept.found_trace == (again and case == "")


def traced_by(network, *options, shift=0):
    """The trace that a run with these options begins with, and whether it was found."""
    prompts = [torch.arange(1 + shift, 20), torch.arange(2 + shift, 31)]
    cfg = compose_options("model=random", *options)
    return begin_study(network, prompts, cfg, lambda name: lambda done, total: None).trace, of_run.RUN_CACHE.found_trace


@pytest.mark.parametrize(
    "family",
    [family if family in ("llama", "gemma3") else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES],
)
def test_a_kept_trace_that_holds_more_is_what_would_have_been_traced(family):
    model = bridge(planted(family))
    traced_by(model, "exp=all", "exp.experiments=[rmsnorm,ffn,emergence]")
    for options in (["exp=generate"], ["exp=ffn"]):
        found, is_found = traced_by(model, *options)
        anew, is_anew_found = traced_by(model, *options, "exp.keep=false")
        assert (is_found, is_anew_found) == (True, False), options
        assert list(found.tables) == list(anew.tables)
        assert list(found.tensors) == list(anew.tensors)
        for name, table in anew.tables.items():
            pd.testing.assert_frame_equal(found.tables[name], table, check_exact=True, check_categorical=False)
        for name, tensor in anew.tensors.items():
            assert torch.equal(found.tensors[name].nan_to_num(-1), tensor.nan_to_num(-1))
        pd.testing.assert_frame_equal(found.prompts, anew.prompts)


def test_a_kept_trace_of_another_model_of_other_prompts_or_of_fewer_probes_is_not_found():
    model = bridge(planted())
    traced_by(model, "exp=generate")
    assert traced_by(model, "exp=generate")[1]
    assert not traced_by(model, "exp=ffn")[1]  # its probes are not all there
    assert not traced_by(model, "exp=generate", shift=1)[1]
    assert not traced_by(model, "exp=generate", "criterion.min_abs=50")[1]  # a setting of a default probe
    next(model.original_model.parameters()).data[5, 5] += 1e-3
    assert not traced_by(model, "exp=generate")[1]


def test_a_kept_trace_is_not_taken_where_its_further_probes_changed_how_the_model_ran(monkeypatch):
    ffn, model = EXPERIMENTS["ffn"], bridge(planted())
    for further in (melens.AttentionEntropy(), melens.SinkMass(key=3).named("on_3")):
        with monkeypatch.context() as patch:
            patch.setitem(EXPERIMENTS, "ffn", replace(ffn, probes=lambda model, options, own=further: [own]))
            traced_by(model, "exp=ffn")
    assert not traced_by(model, "exp=generate")[1]


# --- Benchmarks -------------------------------------------------------------------------------------------------------

INDUCTION = BENCHMARKS["induction"]


def evaluator_of(model, *, judge=None, made=None, **changes):
    model.tokenizer = None
    study = melens.study(model, [torch.arange(1, 20), torch.arange(2, 21)])
    model.tokenizer = made
    benchmarks = [INDUCTION] if judge is None else [INDUCTION, BENCHMARKS["xstest"]]
    options = BenchmarkOptions(judge=judge, chat=False)
    return Evaluator(replace(study, **changes), benchmarks, options, LanguageData(TEXTS), keep=True)


def folder_of(model, **changes):
    return evaluator_of(model, **changes)._store.folder


def test_items_are_kept_by_batches_context_and_the_versions_of_libraries(monkeypatch):
    model = model_of()
    folders = {folder_of(model), folder_of(model, max_batch_tokens=64)}
    model.cfg.n_ctx = 64
    folders.add(folder_of(model))
    version = cache.metadata.version
    for library in ("lm_eval", "jinja2", "datasets"):
        monkeypatch.setattr(cache.metadata, "version", lambda name, new=library: "0" if name == new else version(name))
        folders.add(folder_of(model))
    assert len(folders) == 6
    assert folder_of(model) in folders


def test_items_are_kept_by_tokenizer_not_by_its_size():
    model = model_of()
    folders = set()
    for made in (None, tokenizer(), tokenizer(words=("b", "a", "c")), tokenizer(merges=(("b", "c"),))):
        folders.add(folder_of(model, made=made))
    assert len(folders) == 4


def test_items_are_kept_by_the_judge_s_weights(monkeypatch):
    model, judge = model_of(), model_of()
    judge.tokenizer = byte_tokenizer()
    monkeypatch.setattr(evaluation, "load_model", lambda name, device: judge)
    before = folder_of(model, judge="J", made=tokenizer())
    assert folder_of(model, judge="J", made=tokenizer()) == before
    weight = judge.original_model.lm_head.weight
    weight.data = weight.data.flip(0)
    assert folder_of(model, judge="J", made=tokenizer()) != before


def test_runs_of_one_store_are_told_apart_by_questions_and_mask():
    evaluator = evaluator_of(model_of())
    questions = evaluator._task(INDUCTION)
    others = replace(questions, requests=[*questions.requests[1:], questions.requests[0]])
    masks = [None, WeMask(0.3, start=1), WeMask(0.3, start=2), WeMask(0.3, "random", start=1)]
    assert len({evaluator._key(asked, mask, 0) for asked in (questions, others) for mask in masks}) == 8


@pytest.fixture
def gsm8k(tmp_path):
    (tmp_path / "gsm8k.test.jsonl").write_text('{"question": "What is 1 plus 1?", "answer": "2"}\n')
    return tmp_path


@pytest.mark.parametrize(
    "change", [{"generation_kwargs": {"until": ["x"]}}, {"filter_list": None}, {"doc_to_target": "2"}], ids=str
)
def test_a_task_is_told_by_its_whole_definition(gsm8k, change, monkeypatch):
    config_of = task_definitions._config_of
    before = load_task(BENCHMARKS["gsm8k"], gsm8k).identity
    assert before == load_task(BENCHMARKS["gsm8k"], gsm8k).identity
    monkeypatch.setattr(task_definitions, "_config_of", lambda benchmark: config_of(benchmark) | change)
    assert load_task(BENCHMARKS["gsm8k"], gsm8k).identity != before


def test_how_a_task_was_asked_does_not_stay_on_it(embedded, gsm8k):
    """A sweep loads a task once: a short limit, sampling, or a seed would be the next job's too."""
    task = load_task(BENCHMARKS["gsm8k"], gsm8k)
    (of_harness,) = task.tasks.values()
    before = json.dumps(of_harness.config.generation_kwargs), random_state()
    asking = RequestOptions(max_new_tokens=2, sampling={"temperature": 0.5, "top_p": 0.9})
    items = evaluate(plain_twin(embedded), embedded.tokenizer, task, asking)
    assert len(items) == 2
    assert (json.dumps(of_harness.config.generation_kwargs), random_state()) == before


def random_state():
    return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


# --- Trainings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def training_key(monkeypatch):
    """The folder of a kept training, with some of what it depends on changed."""
    rows = {"rows": "the rows"}
    monkeypatch.setattr(runs, "_data", lambda plan: SimpleNamespace(rows=rows["rows"]))
    monkeypatch.setattr(runs, "hash_rows", str)
    network = gains_apart(plain_model("llama"))
    plant(network, block=1, token=7, dim=21)
    study = study_of(bridge(network), "exp.keep=false")
    assert study.me.layer == 1
    study.model.tokenizer = tokenizer()  # of a first one the bridge changes the special tokens
    plan = training_request(configuration("exp=sft", "training.dataset=sums"), "sft").plan

    def key(**changed):
        rows["rows"] = changed.get("rows", "the rows")
        study.model.tokenizer = changed.get("tokenizer", tokenizer())
        planned = replace(plan, recipe=replace(plan.recipe, **changed.get("recipe", {})))
        return training_store(changed.get("study", study), planned, changed.get("mask")).folder

    key.study = study
    return key


def test_a_training_is_kept_under_all_that_it_depends_on(training_key, monkeypatch):
    study = training_key.study
    masks = [WeMask(rate, start=1).on(study.model) for rate in (0.1, 0.5)]
    others = [
        {"rows": "other rows"},
        {"tokenizer": tokenizer(words=("b", "a", "c"))},
        {"recipe": {"steps": 7}},
        *({"mask": mask} for mask in masks),
        {"study": replace(study, tokens=[ids.flip(0) for ids in study.tokens])},
        {"study": replace(study, me=replace(study.me, layer=2))},
        {"study": replace(study, me=replace(study.me, dims=(1, 2)))},
        {"study": replace(study, max_batch_tokens=64)},
    ]
    folders = [training_key(), *(training_key(**other) for other in others)]
    assert training_key() == folders[0]
    version = cache.metadata.version
    for library in ("trl", "peft", "math-verify", "sympy", "latex2sympy2-extended", "jinja2"):
        monkeypatch.setattr(cache.metadata, "version", lambda name, new=library: "0" if name == new else version(name))
        folders.append(training_key())
    assert len({*folders}) == len(folders) == 16
