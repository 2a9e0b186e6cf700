"""A folder belongs to one run."""

import json
import re
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from hydra.types import RunMode
from omegaconf import OmegaConf

from experiments.options import compose_options
from experiments.runner import command, locks
from experiments.runner.jobs import read_jobs
from experiments.runner.locks import LockFolder, lock_folder, locked_folder, locked_job_folder
from experiments.runner.refusals import note_folder, nothing_left_if_refused
from experiments.runner.sweep import MergeSweep
from melens import MelensError
from melens.report.record import write_failure

ROOT = Path(__file__).parents[2]


@pytest.fixture
def another(tmp_path):
    """The lock of another run in the same folder: the system tells two open files apart, as it does two processes."""
    lock = FileLock(tmp_path / ".melens.lock")
    yield lock
    lock.release(force=True)


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(tmp_path, another):
    another.acquire()
    with pytest.raises(
        MelensError, match=rf"Another run is writing to {tmp_path}\. Wait until it has ended, or choose"
    ):
        lock_folder(tmp_path)
    another.release()
    with locked_folder(tmp_path):
        with locked_folder(tmp_path):  # again by the same run
            pass
        assert not is_free(another)
    assert is_free(another)
    lock_folder(tmp_path)
    with locked_folder(tmp_path):
        pass
    assert not is_free(another)  # what the run had before, it keeps
    locks._taken[tmp_path].release()


def is_free(lock):
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        return False
    lock.release()
    return True


HELD = """
import os, signal
from pathlib import Path
from experiments.runner.locks import lock_folder
lock_folder(Path({!r})); {}
"""


def test_a_run_that_is_killed_gives_its_folder_back(tmp_path):
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", HELD.format(str(tmp_path), kill)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / ".melens.lock").exists()
    with locked_folder(tmp_path):
        pass


@pytest.mark.parametrize("start", ["on_run_start", "on_multirun_start"])
def test_hydra_writes_nothing_into_the_folder_of_another_run(tmp_path, another, start, capsys):
    config = OmegaConf.create({"hydra": {"run": {"dir": str(tmp_path)}, "sweep": {"dir": str(tmp_path)}}})
    another.acquire()
    with pytest.raises(SystemExit) as ended:
        getattr(LockFolder(), start)(config)
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"Error: Another run is writing to {tmp_path}")
    another.release()
    getattr(LockFolder(), start)(config)
    assert not is_free(another)
    locks._taken[tmp_path].release()


def test_a_folder_that_cannot_be_made_is_left_to_what_writes_there(tmp_path):
    (tmp_path / "file").write_text("")
    LockFolder().on_run_start(OmegaConf.create({"hydra": {"run": {"dir": str(tmp_path / "file" / "run")}}}))


@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
def test_two_jobs_of_a_sweep_do_not_share_a_folder(tmp_path, mode, monkeypatch):
    hydra = SimpleNamespace(initialized=lambda: True, get=lambda: SimpleNamespace(mode=mode))
    monkeypatch.setattr(locks, "HydraConfig", hydra)
    with locked_job_folder(tmp_path):
        pass
    if mode == RunMode.MULTIRUN:
        with (
            pytest.raises(MelensError, match=r"Another job of this sweep .*subdir=\$\{hydra\.job\.num\}\."),
            locked_job_folder(tmp_path),
        ):
            pass
    else:
        with locked_job_folder(tmp_path):
            pass


def test_a_job_that_may_not_write_leaves_what_is_there(tmp_path, another, monkeypatch, capsys):
    of_job = SimpleNamespace(runtime=SimpleNamespace(output_dir=tmp_path), verbose=False, mode=RunMode.MULTIRUN)
    monkeypatch.setattr(command, "HydraConfig", SimpleNamespace(get=lambda: of_job))
    monkeypatch.setattr(command, "_failures", [])
    another.acquire()
    command.main.__wrapped__(OmegaConf.create({}))
    assert [type(error) for error in command._failures] == [MelensError]
    assert "Another run is writing to" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".melens.lock"]


def test_runs_that_start_in_the_same_second_have_folders_of_their_own():
    config = (ROOT / "conf" / "config.yaml").read_text()
    patterns = re.findall(r"dir: outputs/\$\{now:(.*?)\}/\$\{now:(.*?)\}", config)
    assert len(patterns) == 2
    now = datetime(2026, 11, 26, 12, 0, 0)
    for pattern in map("/".join, patterns):
        assert now.strftime(pattern) != (now + timedelta(microseconds=1)).strftime(pattern)


def test_a_sweep_in_the_folder_of_an_earlier_one_merges_its_own_jobs(tmp_path, monkeypatch):
    merged = []
    monkeypatch.setattr("experiments.runner.merging.merge_jobs", lambda folder, jobs: merged.append(sorted(jobs)))
    monkeypatch.setattr("experiments.runner.sweep.failed_jobs", [])
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})

    def sweep(n_jobs):
        callback = MergeSweep()
        callback.on_multirun_start(config)
        of_job = {"exp": {"name": "emergence"}, "model": {"name": "tiny"}}
        for number in range(n_jobs):
            write_failure("It broke.", tmp_path / str(number), config=of_job)
        callback.on_multirun_end(config)

    for n_jobs in (3, 2, 0):
        sweep(n_jobs)
    assert merged == [[tmp_path / str(number) for number in range(n_jobs)] for n_jobs in (3, 2, 0)]


@pytest.mark.parametrize(
    ("result", "fails"),
    [
        ({"status": "ok", "metrics": {"me_layer": 3}}, False),
        ({"status": "ok", "metrics": {"sinks": {"me_layer": 3}, "ffn": {"not_applicable": "no FFN"}}}, False),
        ({"status": "ok", "metrics": {"sinks": {"me_layer": 3}, "ffn": {"failed": True}}}, True),
        ({"status": "failed", "error": "It broke."}, True),
    ],
)
def test_a_sweep_fails_with_a_job_that_ran_in_another_process(tmp_path, monkeypatch, result, fails):
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})

    def sweep():
        (tmp_path / "0").mkdir()
        content = {"experiment": "all", "config": {"model": {"name": "tiny"}}} | result
        (tmp_path / "0" / "result.json").write_text(json.dumps(content))
        MergeSweep().on_multirun_end(config)

    monkeypatch.setattr("experiments.runner.merging.merge_jobs", lambda folder, jobs: None)
    failed = []
    for name, value in {"main": sweep, "_failures": [], "failed_jobs": failed}.items():
        monkeypatch.setattr(command, name, value)
    monkeypatch.setattr("experiments.runner.sweep.failed_jobs", failed)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert command.run_command() == int(fails)


def test_only_the_jobs_of_a_sweep_are_read(tmp_path):
    for number in range(3):
        config = compose_options("exp=emergence", "model=random", f"seed={number}").plain()
        write_failure("It broke.", tmp_path / str(number), config=config)
    assert [job.folder.name for job in read_jobs(tmp_path)] == ["0", "1", "2"]
    assert [job.name for job in read_jobs(tmp_path, [tmp_path / "0", tmp_path / "2"])] == ["seed=0", "seed=2"]


@pytest.mark.parametrize(("error", "stays"), [(MelensError, False), (ValueError, True)])
def test_a_run_that_is_refused_leaves_nothing_and_one_that_fails_its_log(tmp_path, error, stays):
    folder = tmp_path / "day" / "time"
    note_folder(folder)
    (folder / ".hydra").mkdir(parents=True)
    (folder / "run.log").write_text("")
    with pytest.raises(error), nothing_left_if_refused(folder):
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["day"] * stays


def test_a_run_that_is_refused_leaves_what_was_in_its_folder_before(tmp_path):
    (tmp_path / "run.log").write_text("of the run before")
    note_folder(tmp_path)
    (tmp_path / ".melens.lock").write_text("")
    (tmp_path / "of another").write_text("")
    with pytest.raises(MelensError), nothing_left_if_refused(tmp_path):
        raise MelensError
    assert {path.name for path in tmp_path.iterdir()} == {"run.log", "of another"}
