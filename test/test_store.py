# SPDX-License-Identifier: Apache-2.0
"""Compiled models between starts: whole or not at all, damaged ones told and made anew, by every back end that keeps any."""

import logging
import os

import numpy as np
import pytest
from test_engines import BACKENDS, pictures

from deeprob_perception import engines
from deeprob_perception.engines import store


def test_what_is_kept_comes_back_and_damage_is_told(tmp_path, caplog):
    path = tmp_path / "x"
    assert store.get(path) is None
    store.put(path, b"content")
    assert store.get(path) == b"content"
    assert os.listdir(tmp_path) == ["x"]
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:10], b"C" + whole[1:], whole + b"x"):
        path.write_bytes(damaged)
        caplog.clear()
        assert store.get(path) is None
        assert "x: damaged" in caplog.text


def test_a_full_disk_costs_a_warning_and_leaves_nothing(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    store.put(tmp_path / "x", b"content")
    assert "No space left" in caplog.text
    assert os.listdir(tmp_path) == []


def test_a_key_depends_on_every_fact_and_on_no_order():
    assert store.key("m", a=1, b=[2]) == store.key("m", b=[2], a=1)
    assert len({store.key("m", a=1), store.key("m", a=2), store.key("m", b=1), store.key("n", a=1)}) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_start_reads_what_the_first_kept_and_damage_is_made_anew(backend, tiny_model, tmp_path, caplog):
    image = pictures(1)

    def labels():
        return engines.load(tiny_model, backend, "fp32", tmp_path, threads=1)(image=image, outputs=("labels",))["labels"]

    expected = labels()
    files = list((tmp_path / backend).iterdir())
    assert len(files) == 1
    written = files[0].stat().st_mtime_ns
    np.testing.assert_array_equal(labels(), expected)
    assert files[0].stat().st_mtime_ns == written
    # Bytes that pass the checksum and are still none of the back end's.
    for damage in (b"garbage", None):
        if damage is None:
            store.put(files[0], b"garbage" * 1000)
        else:
            files[0].write_bytes(damage)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            np.testing.assert_array_equal(labels(), expected)
        assert "made anew" in caplog.text
        assert store.get(files[0]) not in (None, b"garbage" * 1000)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changed_model_of_the_same_name_is_not_taken_from_the_cache(backend, tiny_model, tmp_path):
    import onnx

    path = tmp_path / "m.onnx"
    path.write_bytes(tiny_model.read_bytes())
    engines.load(path, backend, "fp32", tmp_path, threads=1)
    proto = onnx.load(path)
    bias = next(t for t in proto.graph.initializer if t.name == "head.classify.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([1e3, 0, 0, 0, 0, 0, 0], np.float32), bias.name))
    onnx.save(proto, path)
    assert not engines.load(path, backend, "fp32", tmp_path, threads=1)(image=pictures(1))["labels"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_read_only_folder_is_said_and_done_without(backend, tiny_model, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        engine = engines.load(tiny_model, backend, "fp32", tmp_path / "file", threads=1)
    assert "every start compiles anew" in caplog.text
    assert engine(image=pictures(1))["labels"].shape == (1, 96, 128)
