"""A run tells how far it is: lines in the log where there is no terminal, bars where there is one."""

import io
import logging
import multiprocessing
import re
import time

import pytest
from rich.console import Console

from experiments.runner import progress
from experiments.runner.progress import show_stages


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log(tmp_path):
    """Hydra's own two handlers: what the terminal shows, and `run.log`."""
    root, shown, file = logging.getLogger(), io.StringIO(), tmp_path / "run.log"
    handlers = [logging.StreamHandler(shown), logging.FileHandler(file)]
    level = root.level
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    yield shown.getvalue, lambda: file.read_text().splitlines()
    for handler in handlers:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def test_without_a_terminal_each_stage_has_a_line_when_it_begins_goes_on_and_ends(log):
    shown, lines = log
    with show_stages(Console(file=io.StringIO()), every=0.05) as stage:
        loading = stage("loading tiny")
        time.sleep(0.12)
        loading(1, 1)
        done = stage("tokens traced")
        done(100, 400)
        time.sleep(0.12)
        done(400, 400)
        done(400, 400)
    told = lines()
    assert told == shown().splitlines()
    assert told[0] == "loading tiny: begins"
    assert re.fullmatch(r"loading tiny: 0\.\d+ s so far", told[1])
    ends = [line for line in told if "done in" in line or " in 0." in line]
    assert len(ends) == 2
    assert re.fullmatch(r"loading tiny: done in 0\.\d+ s", ends[0])
    assert re.fullmatch(r"tokens traced: 400 in 0\.\d+ s, [\d.,]+ a second", ends[1])
    assert any(
        re.fullmatch(r"tokens traced: 100 of 400 \(25%\), [\d.,]+ a second, about [\d.]+ s left", line) for line in told
    )


def test_of_stages_within_one_another_the_innermost_says_how_far_it_is(log):
    with show_stages(Console(file=io.StringIO()), every=0.05) as stage:
        outer, inner = stage("exp=sinks"), stage("tokens traced")
        time.sleep(0.12)
        inner(1, 1)
        time.sleep(0.08)
        before = len(log[1]())
        outer(1, 1)
        time.sleep(0.12)
    told = log[1]()
    assert {line.split(":")[0] for line in told[2:before] if "so far" in line} == {"tokens traced", "exp=sinks"}
    assert told[2].startswith("tokens traced: ")
    assert len(told) == before + 1  # what has ended is not told again


def test_with_a_terminal_there_are_bars_there_and_lines_in_the_file(log):
    shown, lines = log
    terminal = Terminal()
    with show_stages(Console(file=terminal, force_terminal=True)) as stage:
        stage("tokens traced")(400, 400)
        logging.getLogger("another").info("shown")
    assert "400/400" in terminal.getvalue()
    assert shown() == "shown\n"
    assert [line.split(":")[0] for line in lines()] == ["tokens traced", "tokens traced", "shown"]
    logging.getLogger("experiments.runner.progress").info("after")
    assert shown() == "shown\nafter\n"


def test_jobs_side_by_side_have_lines_on_the_terminal_that_they_share(log, monkeypatch):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "the sweep")
    terminal = Terminal()
    with show_stages(Console(file=terminal, force_terminal=True)) as stage:
        stage("masks")
    assert (log[0](), terminal.getvalue()) == ("masks: begins\n", "")


def test_a_file_that_is_said_to_take_colours_is_no_terminal(log, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with show_stages(Console(file=io.StringIO())) as stage:
        stage("masks")
    assert log[0]() == "masks: begins\n"


def test_other_processes_of_a_run_say_nothing(log):
    with show_stages(Console(quiet=True), every=0.01) as stage:
        stage("masks")(1, 2)
        time.sleep(0.03)
    assert log[1]() == []


def test_an_error_passes_and_ends_the_lines(log):
    with pytest.raises(ZeroDivisionError), show_stages(Console(file=io.StringIO()), every=0.01) as stage:
        stage("masks")(1 // 0, 2)
    told = log[1]()
    time.sleep(0.03)
    assert log[1]() == told


@pytest.mark.parametrize(
    ("so_far", "in_all", "seconds", "words"),
    [
        (0, 0, 61, "masks: 61 s so far"),
        (10, 1_000, 20, "masks: 10 of 1,000 (1%), 2 s each, about 33 min left"),
        (1, 2, 36_000, "masks: 1 of 2 (50%), 10.0 h each, about 10.0 h left"),
        (50_000, 100_000, 100, "masks: 50,000 of 100,000 (50%), 500 a second, about 2 min left"),
        (500, 500, 0.01, "masks: 500 in 0.01 s, 50,000 a second"),
        (7, 7, 0.5, "masks: 7 in 0.5 s, 14 a second"),
        (0, 0, None, "masks: done in 0 s"),
    ],
)
def test_rates_and_what_is_left_in_words(monkeypatch, so_far, in_all, seconds, words):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stage = progress._Stage("masks")
    now[0] += seconds or 0
    if seconds is None or in_all:
        stage.reach(so_far, in_all)
    assert stage.in_words() == words
