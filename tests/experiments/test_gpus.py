"""Runs that are left the choice take a GPU each."""

import logging
import os
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.types import RunMode

from experiments.options import compose_options
from experiments.options.reading import CONF
from experiments.runner import command, gpus
from experiments.runner.gpus import take_gpu


class Machine:
    """Two GPUs, and processes on them that are still running.

    Attributes:
        n_gpus: as PyTorch counts them before CUDA starts.
        n_started: as CUDA counts them.
        visible: `CUDA_VISIBLE_DEVICES` of a new process; None for not set.
    """

    n_gpus, n_started = 2, 1
    visible: str | None = None

    def __init__(self, patch):
        self._patch = patch

    def new_process(self):
        self._patch.setattr(gpus, "_taken", None)
        if self.visible is None:
            self._patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            self._patch.setenv("CUDA_VISIBLE_DEVICES", self.visible)

    def job(self, *options, model="random"):
        """What a new process has in sight in a job with these options, and what it holds until it ends."""
        self.new_process()
        take_gpu(compose_options(f"model={model}", *options).model)
        return os.environ.get("CUDA_VISIBLE_DEVICES"), gpus._taken


@pytest.fixture
def machine(monkeypatch, tmp_path):
    made = Machine(monkeypatch)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(gpus.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: made.n_gpus)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: made.n_started, raising=False)
    return made


def test_runs_side_by_side_have_a_gpu_each_and_more_of_them_share_evenly(machine):
    held = [machine.job() for _ in range(5)]
    assert [gpu for gpu, _ in held] == ["0", "1", "0", "1", "0"]


def test_the_gpu_of_a_run_that_has_ended_is_the_next_ones(machine):
    (_, first), _second, _third = (machine.job() for _ in range(3))
    first.lock.release()  # as the system does when the process ends
    assert machine.job()[0] == "0"
    assert machine.job()[0] == "1"


def test_a_process_keeps_its_gpu_for_its_next_job_and_says_so_in_each_jobs_log(machine, caplog):
    caplog.set_level(logging.INFO)
    _ = machine.job()
    visible, taken = machine.job("model.device=cuda")
    machine.n_gpus = 1  # of the process, which sees no other from then on
    take_gpu(compose_options("model=random").model)
    assert visible == os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert gpus._taken is taken
    assert caplog.messages[1:] == ["computes on GPU 1, one of 2 (CUDA_VISIBLE_DEVICES=1)"] * 2


@pytest.mark.parametrize("visible", ["3,5", "5, 3", "GPU-8f0c,GPU-11aa"])
def test_only_gpus_that_the_user_left_in_sight_are_taken(machine, visible):
    machine.visible = visible
    held = [machine.job() for _ in range(3)]
    first, second = visible.replace(" ", "").split(",")
    assert [gpu for gpu, _ in held] == [first, second, first]


@pytest.mark.parametrize("options", [("model.device=cuda:1",), ("model.device=cpu",)], ids=lambda options: options[0])
def test_a_device_that_is_named_is_used_and_locks_nothing(machine, options, tmp_path):
    assert machine.job(*options) == (None, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["model.device_map=balanced", "model.max_memory={0:1GB,cpu:2GB}"])
def test_a_model_that_is_spread_has_all_gpus_in_sight(machine, option):
    assert machine.job(option, model="smollm2-135m") == (None, None)


def test_a_process_of_accelerate_has_its_gpu_already(machine, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert machine.job() == (None, None)


@pytest.mark.parametrize("n_gpus", [0, 1])
def test_where_there_is_no_choice_nothing_changes(machine, n_gpus, caplog):
    machine.n_gpus = n_gpus
    assert machine.job() == (None, None)
    assert not caplog.messages


def test_a_choice_that_cuda_did_not_see_is_not_claimed(machine, caplog):
    caplog.set_level(logging.INFO)
    machine.n_started = 2
    assert machine.job() == ("0,1", None)
    assert caplog.messages == ["CUDA had started before a GPU was chosen: this run takes the first of 2."]


def test_where_nothing_can_be_locked_the_run_goes_on_with_the_first(machine, monkeypatch, caplog):
    def fails(self, **options):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", fails)
    assert machine.job() == (None, None)
    assert "this run takes the first" in caplog.text


def test_a_job_takes_its_gpu_before_it_loads_anything(tmp_path, monkeypatch):
    done = []
    of_job = SimpleNamespace(overrides=SimpleNamespace(task=["model=random"]), verbose=True, mode=RunMode.RUN)
    monkeypatch.setattr(command, "HydraConfig", SimpleNamespace(get=lambda: of_job))
    monkeypatch.setattr(command, "_failures", [])
    monkeypatch.setattr(gpus, "take_gpu", lambda model: done.append(model.name))
    monkeypatch.setattr("experiments.runner.job.run_job", lambda options, folder: done.append(folder))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        command._run(compose("config", ["model=random"]), tmp_path)
    assert (command._failures, done) == ([], ["random", tmp_path])
