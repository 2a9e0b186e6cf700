"""What is written is whole or absent: after errors, interrupts, kills, on full and on read-only disks."""

import os
import platform
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

from melens.storage import cache
from melens.storage.cache import Store
from melens.storage.files import atomic_file, atomic_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def full_disk(size=4096):
    """No file may grow beyond so many bytes, which to a program is as a full disk is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def write_file(folder, text, error=None):
    with atomic_file(folder / "it") as partial:
        partial.write_text(text)
        if error is not None:
            raise error


def write_folder(folder, text, error=None, *, replace=True):
    with atomic_folder(folder / "it", replace=replace) as partial:
        (partial / "text").write_text(text)
        if error is not None:
            raise error


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("error", [OSError, SafetensorError, ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_an_error_of_any_kind_leaves_what_was_there_and_nothing_else(tmp_path, write, error):
    raised = OSError if error is SafetensorError else error
    with pytest.raises(raised):
        write(tmp_path, "half", error)
    assert names(tmp_path) == []
    write(tmp_path, "whole")
    with pytest.raises(raised):
        write(tmp_path, "half", error)
    assert names(tmp_path) == ["it"]
    text = tmp_path / "it" / "text" if write is write_folder else tmp_path / "it"
    assert text.read_text() == "whole"


def test_a_folder_that_is_not_to_be_replaced_stays(tmp_path):
    write_folder(tmp_path, "first", replace=False)
    write_folder(tmp_path, "second", replace=False)
    assert (tmp_path / "it" / "text").read_text() == "first"
    write_folder(tmp_path, "third", replace=True)
    assert (tmp_path / "it" / "text").read_text() == "third"
    assert names(tmp_path) == ["it"]


def test_a_folder_that_cannot_take_its_place_leaves_the_one_before(tmp_path, monkeypatch):
    write_folder(tmp_path, "first")
    rename = type(tmp_path).rename

    def fail_once(path, target):
        if target.name == "it" and (path / "text").read_text() == "second":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", fail_once)
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path, "second")
    assert (tmp_path / "it" / "text").read_text() == "first"
    assert names(tmp_path) == ["it"]


KILLED = """
import os, signal
from pathlib import Path
from melens.storage.files import atomic_file, atomic_folder
here = Path({folder!r})
with atomic_file(here / "file") as file, atomic_folder(here / "folder", replace=True) as folder:
    file.write_text("half")
    (folder / "text").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_when_its_place_is_used_next(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED.format(folder=str(tmp_path))], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    assert all(name.endswith(".partial") for name in names(tmp_path))
    write_file(tmp_path, "whole")
    assert names(tmp_path) == ["it"]


def test_what_another_process_writes_right_now_stays(tmp_path):
    host, now = platform.node(), time.time()
    stays = [f".a.{host}-{os.getpid()}-0123abcd.partial", f".a.elsewhere-{2**22 + 1}-0123abcd.partial", ".mine.partial"]
    goes = [
        f".a.{host}-{2**22 + 1}-0123abcd.partial",  # no process has this number
        f".b.{host}-{os.getpid()}-0123abcd.partial",  # of another process, which had this one's number
        f".b.elsewhere-{os.getpid()}-0123abcd.partial",  # a day old
    ]
    for name in [*stays, *goes]:
        (tmp_path / name).write_text("half")
        age = 0 if name in (*stays, goes[0]) else 30 * 3600
        os.utime(tmp_path / name, (now - age, now - age))
    write_file(tmp_path, "whole")
    assert names(tmp_path) == sorted([*stays, "it"])


# --- The cache --------------------------------------------------------------------------------------------------------

LARGE = {
    "tensors": lambda store: store.save("a", {"x": torch.arange(10_000)}),
    "table": lambda store: store.save_table("a", pd.DataFrame({"x": torch.rand(10_000).numpy()})),
    "text": lambda store: store.save_text("a", "long " * 10_000),
}


@pytest.fixture
def warnings_of_cache(caplog):
    cache._warn_not_cached.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records if record.name == "melens.storage.cache"]


@pytest.mark.parametrize("save", LARGE.values(), ids=list(LARGE))
def test_a_full_disk_keeps_nothing_stops_nothing_and_is_told_once(tmp_path, save, warnings_of_cache):
    store = Store(tmp_path / "store")
    with full_disk():
        save(store)
        save(store)
    assert names(tmp_path / "store") == []
    (told,) = warnings_of_cache()
    assert told.startswith(f"Cannot write to the cache {cache.cache_folder()} (")
    save(store)
    assert len(names(tmp_path / "store")) == 1


@pytest.mark.parametrize("save", LARGE.values(), ids=list(LARGE))
def test_a_cache_that_cannot_be_written_to_stops_nothing(tmp_path, save, warnings_of_cache):
    (tmp_path / "file").write_text("")
    save(Store(tmp_path / "file" / "store"))
    assert len(warnings_of_cache()) == 1


def test_a_mistake_of_ours_is_raised_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        Store(tmp_path).save_text("a", 7)
    assert names(tmp_path) == []
