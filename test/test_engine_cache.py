# SPDX-License-Identifier: Apache-2.0
"""The cache of built engines: keys, damage, locks, and folders that cannot be written. Files and processes are real."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from deeprob_perception.engines.cache import EngineCache, Key
from deeprob_perception.files import write_whole

pytest.importorskip("filelock", reason="needs the extra `tensorrt`")

KEY = Key("m", "ab" * 32, "tensorrt_rtx", "1.7.1", "", "sm_86", "fp16", "image uint8 [1, 8, 8, 3]", 1)
PLAN = b"an engine" * 1000


def made(plan=PLAN):
    """Return a `make` that counts its calls in `.calls`."""

    def make():
        make.calls += 1
        return plan, {"precision": "fp16"}

    make.calls = 0
    return make


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path)


def files(cache):
    return sorted(p.name for p in cache.folder.iterdir() if not p.name.endswith(".lock"))


def test_an_engine_is_built_once_and_then_read(cache):
    make = made()
    first = cache.get(KEY, make)
    second = cache.get(KEY, make)
    assert make.calls == 1
    assert (first.built, second.built) == (True, False)
    assert first.plan == second.plan == PLAN == second.path.read_bytes()
    assert first.facts == second.facts == json.loads(second.path.with_suffix(".json").read_text())
    assert second.facts["key"] == dataclasses.asdict(KEY)
    assert second.facts["bytes"] == len(PLAN)
    assert files(cache) == [f"{KEY.stem}.engine", f"{KEY.stem}.json"]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Key)])
def test_everything_in_the_key_makes_another_engine(cache, field):
    cache.get(KEY, made())
    other = dataclasses.replace(KEY, **{field: 2 if field == "rules" else "other"})
    assert other.stem != KEY.stem
    assert cache.find(other) is None


DAMAGES = {
    "truncated": lambda engine, facts: engine.write_bytes(PLAN[:100]),
    "empty": lambda engine, facts: engine.write_bytes(b""),
    "one bit": lambda engine, facts: engine.write_bytes(bytes([PLAN[0] ^ 1]) + PLAN[1:]),
    "engine gone": lambda engine, facts: engine.unlink(),
    "json gone": lambda engine, facts: facts.unlink(),
    "json cut": lambda engine, facts: facts.write_text(facts.read_text()[:50]),
    "json no object": lambda engine, facts: facts.write_text("[]"),
    "json of another": lambda engine, facts: facts.write_text(facts.read_text().replace("1.7.1", "1.6.0")),
    "json binary": lambda engine, facts: facts.write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_built_anew_and_said(cache, damage, caplog):
    entry = cache.get(KEY, made())
    DAMAGES[damage](entry.path, entry.path.with_suffix(".json"))
    make = made()
    again = cache.get(KEY, make)
    assert (make.calls, again.built, again.plan) == (1, True, PLAN)
    assert ("built anew" in caplog.text) == (not damage.endswith("gone"))
    assert cache.find(KEY).plan == PLAN


def test_rebuilding_replaces_the_engine_and_what_was_compiled_of_it(cache):
    entry = cache.get(KEY, made())
    entry.path.with_suffix(".kernels").write_bytes(b"kernels")
    assert cache.get(KEY, made(b"newer"), rebuild=True).plan == b"newer"
    assert cache.find(KEY).plan == b"newer"
    assert not entry.path.with_suffix(".kernels").exists()


def test_a_discarded_engine_is_gone(cache):
    cache.get(KEY, made())
    cache.discard(KEY)
    assert files(cache) == []
    cache.discard(KEY)  # nothing to do


def test_a_build_that_fails_leaves_nothing_and_frees_the_lock(cache):
    def fails():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.get(KEY, fails)
    assert files(cache) == []
    assert cache.get(KEY, made()).built


def test_entries_of_a_model_are_listed_and_broken_ones_left_out(cache):
    cache.get(KEY, made())
    cache.get(dataclasses.replace(KEY, precision="fp32"), made())
    cache.get(dataclasses.replace(KEY, model_sha256="cd" * 32), made())
    (cache.folder / "broken.json").write_text("{")
    assert sorted(e["key"]["precision"] for e in cache.entries(KEY.model_sha256)) == ["fp16", "fp32"]
    assert all(os.path.isfile(e["path"]) for e in cache.entries(KEY.model_sha256))


BUILDER = """
import sys, time, logging
sys.path.insert(0, {tests!r})
import test_engine_cache as t
logging.basicConfig(level=logging.INFO)
import deeprob_perception.engines.cache as c
c.WAITING = 0.3
def make():
    print("building", flush=True)
    time.sleep({seconds})
    return t.PLAN, {{"precision": "fp16"}}
entry = t.EngineCache({folder!r}).get(t.KEY, make)
assert entry.plan == t.PLAN
print("built" if entry.built else "taken", flush=True)
"""


def process(folder, seconds):
    code = BUILDER.format(tests=os.path.dirname(__file__), folder=str(folder), seconds=seconds)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_at_once_build_one_engine(tmp_path):
    """The second waits, says so, and takes what the first built."""
    first = process(tmp_path, 3)
    assert first.stdout.readline() == "building\n"
    second = process(tmp_path, 3)
    outs = [p.communicate(timeout=60) for p in (first, second)]
    assert [p.returncode for p in (first, second)] == [0, 0], outs
    assert outs[0][0] == "built\n"
    assert outs[1][0] == "taken\n"  # without "building"
    assert "another process is building" in outs[1][1]


def test_a_process_killed_while_building_holds_nobody_up(tmp_path, cache):
    killed = process(tmp_path, 600)
    assert killed.stdout.readline() == "building\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    # What one leaves that is killed while it writes, by the name that it writes under.
    partial = cache.folder / f".{KEY.stem}.abc123.partial"
    partial.write_bytes(PLAN[:500])
    began = time.monotonic()
    assert cache.get(KEY, made()).built
    assert time.monotonic() - began < 5
    assert not partial.exists()
    assert cache.find(KEY).plan == PLAN


def test_threads_of_one_process_build_one_engine(cache, monkeypatch):
    monkeypatch.setattr("deeprob_perception.engines.cache.WAITING", 0.2)
    calls, entries = [], []

    def make():
        calls.append(1)
        time.sleep(1)
        return PLAN, {}

    threads = [threading.Thread(target=lambda: entries.append(cache.get(KEY, make))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert [e.plan for e in entries] == [PLAN] * 3


def test_where_no_folder_can_be_made_the_engine_is_built_and_used(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = EngineCache(tmp_path / "file")
    for _ in range(2):
        entry = cache.get(KEY, made())
        assert (entry.plan, entry.path, entry.built) == (PLAN, None, True)
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 2
    assert "cannot be kept" in lines[0] and "each start builds anew" in lines[0] and "\n" not in lines[0]


READER = """
import os, sys, logging
sys.path.insert(0, {tests!r})
import test_engine_cache as t
os.setgroups([]); os.setgid(65534); os.setuid(65534)
logging.basicConfig()
cache = t.EngineCache({folder!r})
entry = cache.get(t.KEY, t.made(b"other"))
print(entry.built, entry.plan == t.PLAN, entry.path is not None)
other = cache.get(t.dataclasses.replace(t.KEY, precision="fp32"), t.made())
print(other.built, other.plan == t.PLAN, other.path)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="changes to a user without rights, which only root can")
def test_a_read_only_folder_gives_what_it_holds_and_the_rest_is_built(tmp_path):
    """As in an image that was baked with its engines. Root may write anywhere, so another user tries."""
    folder = tmp_path / "cache"
    EngineCache(folder).get(KEY, made())
    for path in (tmp_path, *tmp_path.parents[: len(tmp_path.parents) - 2]):
        path.chmod(0o755)
    (folder / "tensorrt").chmod(0o555)
    code = READER.format(tests=os.path.dirname(__file__), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.splitlines() == ["False True True", "True True None"], done.stderr
    assert "cannot be kept" in done.stderr and "Permission denied" in done.stderr


SMALL_DISK = """
import resource, signal, sys, logging
sys.path.insert(0, {tests!r})
import test_engine_cache as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
entry = t.EngineCache({folder!r}).get(t.KEY, t.made())
print(entry.built, entry.plan == t.PLAN, entry.path)
"""


def test_where_the_file_does_not_fit_the_engine_is_used_and_nothing_is_left(tmp_path):
    """A limit on the size of files stops the write half-way, as a full disk does."""
    code = SMALL_DISK.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True True None\n", done.stderr
    assert "cannot be kept" in done.stderr
    assert files(EngineCache(tmp_path)) == []


def test_a_full_disk_is_called_so(cache, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY, made()).path is None
    assert "the disk is full" in caplog.text
    assert files(cache) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.engine"
    write_whole(path, b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
