"""What a run writes that is stopped, and what it says."""

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_files import full_disk
from test_results import CONFIG, Breaks, ffn_result, names, picture, some_result
from written import write_result

from experiments.options import compose_options
from experiments.runner import command, writing
from experiments.runner.interrupts import sigterm_interrupts
from experiments.runner.job import give_freed_memory_back
from experiments.runner.writing import finish, note_if_stopped, stopped_message, write_part
from melens import MelensError
from melens.report.record import Record
from melens.storage.cache import RUN_CACHE

ROOT = Path(__file__).parents[2]
ALL = ("exp=all", "model=random", "exp.experiments=[direction,ffn]")


def record_of(folder, *experiments):
    return Record(folder, config=CONFIG, experiments=experiments or ["direction", "ffn"])


def described(result):
    """A report tells of the model and the prompts too."""
    model = {"architecture": "LlamaForCausalLM", "n_layers": 4, "d_model": 64}
    metrics = result.metrics.model_copy(update={"n_prompts": 3, "distinct_first_tokens": 3})
    return replace(result, model=result.model | model, metrics=metrics)


@pytest.fixture(autouse=True)
def _nothing_is_kept(monkeypatch):
    for name in vars(RUN_CACHE):
        monkeypatch.setattr(RUN_CACHE, name, False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_a_stopped_run_found_is_there_with_a_report_that_says_so(tmp_path, error):
    record, cfg = record_of(tmp_path), compose_options(*ALL)
    write_part(record, described(some_result()), cfg)
    assert "This run has not finished." in (tmp_path / "report.html").read_text()

    def stop():
        RUN_CACHE.has_trace = True
        raise error

    with pytest.raises(error) as raised, note_if_stopped(record, cfg):
        stop()
    written = {"norms.parquet", "norms.html", "plotly.min.js", "report.html", "claims.md", "result.partial.json"}
    assert names(tmp_path) == written
    assert json.loads((tmp_path / "result.partial.json").read_text())["status"] == "stopped"
    assert "This run was stopped." in (tmp_path / "report.html").read_text()
    if error is KeyboardInterrupt:
        told = f"1 of 2 experiments are written to {tmp_path}. Run the same command again to go on with ffn."
        assert str(raised.value) == told


def test_a_run_that_ended_has_a_report_of_the_whole_and_no_partial_result(tmp_path):
    record, cfg = record_of(tmp_path), compose_options(*ALL)
    for result in (some_result(), ffn_result()):
        write_part(record, described(result), cfg)
    paths = finish(record, cfg)
    with pytest.raises(KeyboardInterrupt) as raised, note_if_stopped(record, cfg):
        raise KeyboardInterrupt  # in the last moment
    assert str(raised.value) == f"the results are in {tmp_path}."
    assert [path.name for path in paths[-3:]] == ["result.json", "claims.md", "report.html"]
    assert "result.partial.json" not in names(tmp_path)
    assert 'class="missing"' not in (tmp_path / "report.html").read_text()


def test_a_full_disk_is_told_in_a_sentence_and_leaves_what_was_whole(tmp_path):
    record, cfg = record_of(tmp_path), compose_options(*ALL)
    write_part(record, described(some_result()), cfg)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    told = pytest.raises(MelensError, match=r"^Cannot write to .*: File too large\.$")
    with full_disk(), told, note_if_stopped(record, cfg):
        write_part(record, described(ffn_result()), cfg)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: after[name] for name in before if name != "result.partial.json"} == {
        name: before[name] for name in before if name != "result.partial.json"
    }
    assert json.loads(after["result.partial.json"])["status"] in ("running", "stopped")
    assert not [name for name in after if name.endswith(".partial")]


@pytest.mark.parametrize(
    ("options", "kept", "sentence"),
    [
        (("exp=emergence",), {}, "no result was written."),
        (
            ("exp=wemask",),
            {"has_trace": True},
            "no result was written. What was measured so far is kept. Run the",
        ),
        (("exp=wemask",), {}, "no result was written."),
        (("exp=wemask",), {"has_trace": True, "is_incomplete": True}, "no result was written."),
        (ALL, {}, "no result was written."),
        (("exp=generate",), {"has_trace": True}, "no result was written."),
        (
            ("exp=sft", "training.dataset=sums"),
            {},
            "no result was written. Add training.resume={} to go on from",
        ),
    ],
)
def test_an_interrupt_says_what_is_left(tmp_path, monkeypatch, options, kept, sentence):
    for name, value in kept.items():
        monkeypatch.setattr(RUN_CACHE, name, value)
    (tmp_path / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-1" / "trainer_state.json").touch()
    told = stopped_message(record_of(tmp_path), compose_options("model=random", *options))
    assert told.startswith(sentence.format(tmp_path))
    assert told.endswith(".")
    assert (told == sentence) == sentence.endswith(".")


def test_an_interrupt_of_a_resumed_training_finds_the_checkpoints_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    state = tmp_path / "first" / "checkpoints" / "checkpoint-1" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.touch()
    options = ("exp=sft", "training.dataset=sums", "training.resume='~/first'")
    told = stopped_message(record_of(tmp_path / "second"), compose_options("model=random", *options))
    assert told.endswith(f"Add training.resume={state.parents[2]} to go on from the last checkpoint.")


@pytest.mark.parametrize("kept", [{}, {"has_trace": True, "is_incomplete": True}])
def test_where_nothing_is_kept_nothing_is_said_of_going_on(tmp_path, monkeypatch, kept):
    for name, value in kept.items():
        monkeypatch.setattr(RUN_CACHE, name, value)
    record = record_of(tmp_path)
    record.parts.append(some_result())
    assert stopped_message(record, compose_options(*ALL)).endswith(". The others did not end.")


def test_a_run_stopped_as_its_first_result_is_written_has_none(tmp_path):
    record, cfg = record_of(tmp_path), compose_options(*ALL)
    with pytest.raises(KeyboardInterrupt, match=r"^no result was written\.$"), note_if_stopped(record, cfg):
        write_part(record, some_result(figures={"a": picture(Breaks())}), cfg)
    assert json.loads((tmp_path / "result.partial.json").read_text())["status"] == "stopped"


@pytest.mark.parametrize("has_trace", [True, False])
def test_an_interrupt_tells_that_the_result_in_the_folder_is_an_earlier_run_s(tmp_path, monkeypatch, has_trace):
    monkeypatch.setattr(RUN_CACHE, "has_trace", has_trace)
    write_result(some_result(), tmp_path, config=CONFIG, duration=1.0)
    told = stopped_message(record_of(tmp_path), compose_options(*ALL))
    start = f"no result was written ({tmp_path / 'result.json'} is of an earlier run)"
    again = " What was measured so far is kept. Run the same command again to go on with the rest." * has_trace
    assert told == f"{start}.{again}"


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "is_first_process", lambda: False)
    record, cfg = record_of(tmp_path / "run"), compose_options(*ALL)
    write_part(record, some_result(), cfg)
    assert finish(record, cfg) == []
    assert names(tmp_path) == set()


def test_sigterm_leaves_as_an_interrupt_does():
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_is_left_to_whoever_listens_already():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *told: heard.append(told))  # as submitit does
    try:
        with sigterm_interrupts():
            signal.raise_signal(signal.SIGTERM)
        assert len(heard) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_signals_are_left_alone():
    entered = []

    def enter():
        with sigterm_interrupts():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered


def test_windows_has_no_libc_to_ask(monkeypatch):
    def no_such_library(name):
        raise TypeError("bad argument type for built-in operation")

    monkeypatch.setattr(ctypes, "CDLL", no_such_library)
    monkeypatch.setattr("experiments.runner.job.sys", SimpleNamespace(platform="win32"))
    give_freed_memory_back()


@pytest.mark.parametrize("is_first", [True, False], ids=["first job", "later job"])
def test_what_the_first_job_imports_is_never_searched_for_garbage_but_what_jobs_leave_is(monkeypatch, is_first):
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    frozen = []
    if is_first:
        monkeypatch.delitem(sys.modules, "experiments.runner.job")
    with command._importing():
        assert gc.isenabled() is not is_first
    assert gc.isenabled()
    assert frozen == [True] * is_first


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_before_there_is_work_a_signal_ends_the_run_at_once(name):
    code = (
        f"import signal; from experiments.runner.interrupts import exit_on_signal, restore_signals; "
        f"before = signal.getsignal(signal.{name}); exit_on_signal(); restore_signals(); "
        f"assert signal.getsignal(signal.{name}) is before; "
        f"exit_on_signal(); signal.raise_signal(signal.{name})"
    )
    begin = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}"
    done = subprocess.run([sys.executable, "-c", begin], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (130, "Interrupted: no result was written.\n")


def test_a_reader_that_has_enough_of_the_help_gets_no_traceback(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        command._print_and_let_go("The help.")
