# SPDX-License-Identifier: Apache-2.0
"""How a TensorRT engine is run: buffers, graph capture, errors, loading. Without a GPU against stand-ins (fake_cuda.py);
those marked `gpu` run real engines where there is one."""

import logging
import sys
import threading

import numpy as np
import pytest
from fake_cuda import FakeLibrary, FakeRuntime

from deeprob_perception import engines
from deeprob_perception.engines import builder, cuda, model_file, tensorrt
from deeprob_perception.engines.cache import EngineCache, Entry
from deeprob_perception.engines.tensorrt import EngineRefused, TensorRtEngine
from deeprob_perception.errors import EngineError

SIZE = (96, 128)


@pytest.fixture
def runtime(monkeypatch):
    """The stand-in for `cuda.bindings.runtime`, also where cuda-bindings is not installed."""
    fake = FakeRuntime()
    package = type("bindings", (), {"runtime": fake})
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    return fake


@pytest.fixture
def library(runtime):
    return FakeLibrary(runtime, SIZE)


@pytest.fixture
def model(tiny_model):
    return model_file.read(tiny_model)


@pytest.fixture
def engine(model, library):
    return TensorRtEngine(model, "auto", "fp16", library, b"engine")


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (1, *SIZE, 3), dtype=np.uint8)


def test_what_runs_is_told(engine):
    assert (engine.backend, engine.precision, engine.requested_precision) == ("tensorrt", "fp16", "auto")
    assert engine.device == "Fake RTX (sm_86, TensorRT 10.3.0)"


def test_answers_are_right_from_the_first_frame_through_the_captured_ones(engine, runtime):
    for i in range(5):
        found = engine(image=image(i))
        np.testing.assert_array_equal(found["labels"], image(i)[..., 0])
        np.testing.assert_array_equal(found["confidence"], image(i)[..., 1])
    assert runtime.calls.count("cudaGraphInstantiate") == 1
    assert runtime.calls.count("cudaGraphLaunch") == 4  # all but the first, in which TensorRT may allocate


def test_everything_is_allocated_once(engine, runtime):
    before = {name: runtime.calls.count(name) for name in ("cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags")}
    assert before == {"cudaMalloc": 3, "cudaHostAlloc": 3, "cudaStreamCreateWithFlags": 1}
    for i in range(4):
        engine(image=image(i), outputs=("labels",))
    assert {name: runtime.calls.count(name) for name in before} == before


def test_results_are_the_callers_to_keep(engine):
    kept = [engine(image=image(i), outputs=("labels",))["labels"] for i in range(4)]
    for i, labels in enumerate(kept):
        np.testing.assert_array_equal(labels, image(i)[..., 0])
        labels[:] = 0


def test_outputs_that_nobody_asked_for_are_not_copied_back(engine, runtime):
    for wanted in (("labels",), ("labels",), ("labels",), ("labels", "confidence"), ("confidence",), ("confidence",)):
        runtime.calls.clear()
        found = engine(image=image(), outputs=wanted)
        assert tuple(found) == wanted
        assert runtime.calls.count("to_host") == len(wanted)
        assert runtime.calls.count("to_device") == 1
        for name in wanted:
            np.testing.assert_array_equal(found[name], image()[..., ("labels", "confidence").index(name)])


@pytest.mark.parametrize("refusing", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_where_no_graph_can_be_captured_frames_are_enqueued_one_by_one(engine, runtime, refusing, caplog):
    runtime.fail[refusing] = 900
    with caplog.at_level(logging.WARNING):
        for i in range(4):
            np.testing.assert_array_equal(engine(image=image(i), outputs=("labels",))["labels"], image(i)[..., 0])
    assert runtime.calls.count("cudaGraphLaunch") == 0
    (line,) = [r.getMessage() for r in caplog.records]  # once, not with every frame
    assert "no CUDA graph" in line and "not permitted" in line


def test_a_network_that_refuses_to_be_captured_still_runs(engine, library, runtime, caplog):
    library.context.refuses_capture = True
    for i in range(3):
        np.testing.assert_array_equal(engine(image=image(i))["labels"], image(i)[..., 0])
    assert runtime.capturing is None  # a capture that is not ended leaves the stream unusable
    assert "the network cannot run now" in caplog.text


def test_a_failing_frame_is_one_line_and_the_next_one_runs(engine, library):
    library.execution_fails = True
    with pytest.raises(EngineError, match=r"^TensorRT failed on tiny\.onnx: the network cannot run now$"):
        engine(image=image())
    library.execution_fails = False
    np.testing.assert_array_equal(engine(image=image(3))["labels"], image(3)[..., 0])


def test_a_failing_wait_is_told_in_cudas_words(engine, runtime):
    runtime.fail["cudaEventSynchronize"] = 1
    with pytest.raises(EngineError, match="CUDA failed: running the frame: invalid value"):
        engine(image=image())


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaHostAlloc"])
def test_out_of_memory_names_what_was_to_be_allocated_and_frees_the_rest(model, library, runtime, call):
    runtime.fail[call] = 2
    with pytest.raises(cuda.OutOfGpuMemory, match=r"out of GPU memory: \d+ .*for image of tiny\.onnx; end other programs"):
        TensorRtEngine(model, "auto", "fp16", library, b"engine")
    assert runtime.memory == {}
    assert "cudaStreamDestroy" in runtime.calls


def test_out_of_memory_for_the_context_is_called_so(model, library):
    library.no_memory = True
    with pytest.raises(cuda.OutOfGpuMemory, match=r"cannot set up tiny\.onnx on Fake RTX: .*out of memory"):
        TensorRtEngine(model, "auto", "fp16", library, b"engine")


def test_closing_frees_everything_once(engine, runtime):
    engine(image=image())
    engine(image=image())
    engine.close()
    assert runtime.memory == {}
    assert runtime.calls.count("cudaGraphExecDestroy") == 1
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine(image=image())


def test_a_thread_takes_the_device_before_it_works(engine, runtime):
    """The primary context is current per thread; a worker's first call must not find none."""
    runtime.calls.clear()
    thread = threading.Thread(target=lambda: engine(image=image()))
    thread.start()
    thread.join()
    assert runtime.calls[0] == "cudaSetDevice"


def test_bytes_that_are_no_engine_are_refused(model, library):
    with pytest.raises(EngineRefused, match=r"refuses the engine of tiny\.onnx: Magic tag does not match"):
        TensorRtEngine(model, "auto", "fp16", library, b"something")


def test_an_engine_of_another_model_is_refused(model, runtime):
    with pytest.raises(EngineRefused, match=r"of another model: it has image uint8 \[1, 48, 64, 3\].*has image uint8 \[1, 96"):
        TensorRtEngine(model, "auto", "fp16", FakeLibrary(runtime, (48, 64)), b"engine")


class Kernels:
    """A stand-in for TensorRT for RTX's runtime cache."""

    accepts, given = True, None

    def deserialize(self, content):
        Kernels.given = content
        return self.accepts

    def serialize(self):
        return b"compiled"


def test_what_is_compiled_on_this_machine_is_kept_for_the_next_start(model, library, tmp_path, monkeypatch, caplog):
    from fake_cuda import FakeEngine

    config = type("Config", (), {"create_runtime_cache": lambda self: Kernels(), "set_runtime_cache": lambda self, c: None})
    monkeypatch.setattr(FakeEngine, "create_runtime_config", lambda self: config(), raising=False)
    create = FakeEngine.create_execution_context
    monkeypatch.setattr(FakeEngine, "create_execution_context", lambda self, config=None: create(self))
    monkeypatch.setattr(FakeLibrary, "builds_anywhere", True)
    path = tmp_path / "m.kernels"
    first = TensorRtEngine(model, "auto", "fp16", library, b"engine", path)
    assert not path.exists()
    first(image=image())
    assert path.read_bytes() == b"compiled"
    TensorRtEngine(model, "auto", "fp16", library, b"engine", path)
    assert Kernels.given == b"compiled"
    # A folder that cannot be written costs a warning.
    (tmp_path / "file").write_text("")
    other = TensorRtEngine(model, "auto", "fp16", library, b"engine", tmp_path / "file" / "m.kernels")
    other(image=image())
    assert "each start compiles its kernels" in caplog.text


class TestLoad:
    """`engines.load` with a stand-in for the build, so that what TensorRT refuses can be handed out."""

    @pytest.fixture(autouse=True)
    def setting(self, monkeypatch, library):
        self.plans, self.builds = [b"engine"], []
        target = builder.Target("sm_86", "Fake RTX", library, True)
        monkeypatch.setattr(builder, "find_target", lambda sm=None: target)
        monkeypatch.setattr(tensorrt, "unavailable", lambda: None)

        def run(build):
            self.builds.append(build.precision)
            return self.plans.pop(0), {"precision": build.precision, "requested_precision": build.precision}

        monkeypatch.setattr(builder._Build, "run", run)

    def load(self, tiny_model, tmp_path, **options):
        return engines.load(tiny_model, "tensorrt", cache_dir=tmp_path, **options)

    def test_auto_is_fp16_and_the_second_load_reads_the_cache(self, tiny_model, tmp_path):
        assert not engines.ready(tiny_model, "tensorrt", cache_dir=tmp_path)
        for _ in range(2):
            engine = self.load(tiny_model, tmp_path)
            assert (engine.precision, engine.requested_precision) == ("fp16", "auto")
        assert self.builds == ["fp16"]
        assert engines.ready(tiny_model, "tensorrt", "auto", tmp_path)
        assert engines.ready(tiny_model, "tensorrt", "fp16", tmp_path)
        assert not engines.ready(tiny_model, "tensorrt", "fp32", tmp_path)

    def test_a_cached_engine_that_tensorrt_refuses_is_built_anew(self, tiny_model, tmp_path, caplog):
        """Its file is whole and its key right: written by a TensorRT that says it is of this version, say."""
        self.plans = [b"foreign", b"engine"]
        cache, key = EngineCache(tmp_path), builder.key_of(model_file.read(tiny_model), "fp16", builder.find_target())
        cache.get(key, lambda: (self.plans.pop(0), {"precision": "fp16"}))
        engine = self.load(tiny_model, tmp_path)
        np.testing.assert_array_equal(engine(image=image())["labels"], image()[..., 0])
        assert "Magic tag does not match; it is built anew" in caplog.text
        assert cache.find(key).plan == b"engine"

    def test_one_that_is_refused_when_it_is_new_is_an_error_and_not_a_loop(self, tiny_model, tmp_path):
        self.plans = [b"foreign"]
        with pytest.raises(EngineRefused, match="Magic tag"):
            self.load(tiny_model, tmp_path)
        assert self.builds == ["fp16"]

    def test_a_damaged_file_is_built_anew(self, tiny_model, tmp_path, caplog):
        self.plans = [b"engine", b"engine"]
        self.load(tiny_model, tmp_path)
        (path,) = (tmp_path / "tensorrt").glob("*.engine")
        path.write_bytes(b"eng")
        assert not engines.ready(tiny_model, "tensorrt", cache_dir=tmp_path)
        assert self.load(tiny_model, tmp_path)(image=image())["labels"].any()
        assert "damaged" in caplog.text

    def test_without_a_place_for_the_cache_it_still_loads(self, tiny_model, tmp_path, caplog):
        (tmp_path / "file").write_text("")
        assert self.load(tiny_model, tmp_path / "file")(image=image())["labels"].any()
        assert "each start builds anew" in caplog.text

    def test_a_fallback_is_what_the_engine_says(self, tiny_model, tmp_path, monkeypatch):
        facts = {"precision": "bf16", "requested_precision": "fp16"}
        monkeypatch.setattr(builder, "build", lambda *_, **__: Entry(b"engine", facts, None))
        engine = self.load(tiny_model, tmp_path, precision="fp16")
        assert (engine.precision, engine.requested_precision) == ("bf16", "fp16")


class TestUnavailable:
    def test_no_driver(self, runtime):
        runtime.driver = 0
        assert "no NVIDIA driver" in tensorrt.unavailable()

    def test_an_old_driver_says_what_to_install(self, runtime):
        runtime.driver, runtime.fail["cudaGetDeviceCount"] = 12060, 35
        reason = tensorrt.unavailable()
        assert "knows CUDA 12.6, and cuda-bindings brings 13.5" in reason
        assert "pip install 'cuda-bindings==12.*'" in reason

    @pytest.mark.parametrize(("devices", "status"), [(0, 0), (0, 100)])
    def test_no_gpu(self, runtime, devices, status):
        runtime.devices, runtime.fail["cudaGetDeviceCount"] = devices, status
        assert "finds no GPU" in tensorrt.unavailable()

    def test_no_cuda_bindings(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        assert "pip install cuda-bindings" in tensorrt.unavailable()

    def test_no_tensorrt(self, runtime, monkeypatch, tiny_model):
        for name in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, name, None)
        assert "pip install tensorrt-rtx-cu13" in tensorrt.unavailable()
        with pytest.raises(EngineError, match="tensorrt cannot be used: TensorRT is not installed"):
            engines.load(tiny_model, "tensorrt")


NO_GPU = tensorrt.unavailable()


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU is not None, reason=f"needs a GPU with TensorRT: {NO_GPU}")
class TestOnAGpu:
    """Real engines on a real GPU."""

    @pytest.fixture(scope="class")
    def cache(self, tmp_path_factory):
        return tmp_path_factory.mktemp("cache")

    @pytest.fixture(scope="class", params=["fp32", "fp16", "bf16"])
    def gpu_engine(self, request, tiny_model, cache):
        return engines.load(tiny_model, "tensorrt", request.param, cache)

    def test_it_runs_in_the_precision_that_was_asked_for(self, gpu_engine):
        assert gpu_engine.precision == gpu_engine.requested_precision

    def test_labels_and_confidence_are_those_of_onnxruntime(self, gpu_engine, tiny_model):
        from deeprob_perception.engines import parity

        samples = parity.synthetic((1, *SIZE, 3), 6)
        reference = parity.onnx_session(model_file.parse(tiny_model), "the model")
        found = parity.measure([reference(i) for i in samples.images], gpu_engine.all_of, samples, gpu_engine.device)
        print(gpu_engine, found.line())
        assert found.shortfall(gpu_engine.precision) is None

    def test_frames_are_one_cuda_graph_and_answers_stay_the_same(self, gpu_engine):
        frames = [image(i) for i in range(4)]
        first = [gpu_engine(image=f, outputs=("labels",))["labels"] for f in frames]
        again = [gpu_engine(image=f, outputs=("labels",))["labels"] for f in frames]
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)
        assert gpu_engine._frame._graphs[("labels",)] is not None

    def test_two_engines_share_the_gpu_from_threads_of_their_own(self, gpu_engine, tiny_model, cache):
        other = engines.load(tiny_model, "tensorrt", gpu_engine.precision, cache)
        expected = gpu_engine(image=image(1))["labels"]
        results = []

        def work(engine):
            results.extend(engine(image=image(1))["labels"] for _ in range(50))

        threads = [threading.Thread(target=work, args=(e,)) for e in (gpu_engine, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 100
        assert all((r == expected).all() for r in results)
        other.close()

    def test_a_damaged_engine_is_built_anew(self, tiny_model, tmp_path, caplog):
        expected = engines.load(tiny_model, "tensorrt", "fp16", tmp_path)(image=image())["labels"]
        (path,) = (tmp_path / "tensorrt").glob("*.engine")
        path.write_bytes(path.read_bytes()[:1000])
        np.testing.assert_array_equal(engines.load(tiny_model, "tensorrt", "fp16", tmp_path)(image=image())["labels"], expected)
        assert "damaged" in caplog.text

    def test_bytes_that_tensorrt_refuses_raise_no_more_than_a_line(self, tiny_model):
        target = builder.find_target()
        with pytest.raises(EngineRefused):
            TensorRtEngine(model_file.read(tiny_model), "fp16", "fp16", target.library, b"x" * 1000)
