# SPDX-License-Identifier: Apache-2.0
"""Every back end behind the one interface: right answers, clear refusals, no silent change."""

import logging
import subprocess
import sys

import numpy as np
import onnx
import pytest

from deeprob_perception import engines
from deeprob_perception.errors import EngineError, ModelError

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(engines.unavailable(name) is not None, reason=f"{engines.unavailable(name)}"))
    for name in engines.BACKENDS
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def loaded(tiny_model, cache):
    """Return a function: back end -> its engine for the test model in fp32, loaded once."""
    kept = {}

    def load(backend):
        if backend not in kept:
            kept[backend] = engines.load(tiny_model, backend, "fp32", cache, threads=1)
        return kept[backend]

    return load


@pytest.fixture(params=BACKENDS)
def engine(request, loaded):
    return loaded(request.param)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Smooth shapes with edges and a little noise, as a camera gives them: uint8 `[count, 96, 128, 3]`."""
    import cv2

    random = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        image = cv2.resize(random.integers(0, 256, (4, 5, 3), dtype=np.uint8), (128, 96), interpolation=cv2.INTER_CUBIC)
        for _ in range(6):
            centre, radius = random.integers(0, 128, 2).tolist(), int(random.integers(5, 30))
            cv2.circle(image, centre, radius, random.integers(0, 256, 3).tolist(), -1, cv2.LINE_AA)
        images.append(np.clip(image + random.normal(0, 4, image.shape), 0, 255).astype(np.uint8))
    return np.stack(images)


@pytest.fixture(scope="module")
def reference(tiny_net, tiny_recipe):
    """Return a function: image -> (labels, confidence), by torch with the weights that the file holds."""
    import torch

    from deeprob_perception import export
    from deeprob_perception.nets import segmenter

    net = segmenter.build(tiny_recipe).eval()
    net.load_state_dict(export.round_weights(tiny_net.state_dict()))
    mean, std = (torch.tensor(tiny_recipe[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))

    def run(image):
        # From the recipe's definition, not from export's graph: RGB in 0..1, normalised.
        rgb = torch.from_numpy(image[..., ::-1].copy()).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            probability = net((rgb - mean) / std).softmax(1)
        confidence, labels = probability.max(1)
        return labels.numpy(), confidence.numpy()

    return run


def test_labels_and_confidence_are_those_of_torch(engine, reference):
    agreeing = []
    for image in pictures(6):
        labels, confidence = reference(image[None])
        out = engine(image=image[None])
        assert len(np.unique(labels)) >= 3  # a constant answer would agree for nothing
        agreeing.append((out["labels"] == labels).mean())
        np.testing.assert_allclose(out["confidence"] / 255, confidence, atol=0.004)  # half a step of 1/255, and rounding
    print(engine, "agreement", np.mean(agreeing))
    assert np.mean(agreeing) >= 0.999


def test_camvid_frames_agree_with_torch(engine, reference, shared):
    import cv2

    files = sorted((shared / "data" / "camvid").rglob("*.png")) + sorted((shared / "data" / "camvid").rglob("*.jpg"))
    frames = [image for image in (cv2.imread(str(f)) for f in files[:: max(1, len(files) // 8)][:8]) if image.std() > 20]
    assert frames
    agreeing = []
    for frame in frames:
        image = cv2.resize(frame, (128, 96), interpolation=cv2.INTER_AREA)[None]
        agreeing.append((engine(image=image, outputs=["labels"])["labels"] == reference(image)[0]).mean())
    assert np.mean(agreeing) >= 0.999


def test_what_runs_is_reported(engine, tiny_model):
    assert engine.precision == "fp32"
    assert engine.requested_precision == "fp32"
    assert engine.backend in engines.BACKENDS
    assert engine.device
    assert engine.path == tiny_model
    assert engine.metadata["task"] == "segmentation"
    assert (engine.inputs[0].name, engine.inputs[0].shape) == ("image", (1, 96, 128, 3))


def test_only_what_was_asked_for_comes_back(engine):
    image = pictures(1)
    assert list(engine(image=image, outputs=("labels",))) == ["labels"]
    assert list(engine(image=image, outputs=("confidence",))) == ["confidence"]
    both = engine(image=image)
    assert list(both) == ["labels", "confidence"]
    for name, array in both.items():
        assert (array.dtype, array.shape) == (np.uint8, (1, 96, 128))
        np.testing.assert_array_equal(array, engine(image=image, outputs=(name,))[name])


def test_results_are_safe_to_keep(engine):
    first, second = pictures(2)[:, None]
    kept = engine(image=first, outputs=("labels",))["labels"]
    copy = kept.copy()
    other = engine(image=second, outputs=("labels",))["labels"]
    assert (other != copy).any()
    np.testing.assert_array_equal(kept, copy)
    kept[:] = 0  # the caller's own memory
    np.testing.assert_array_equal(engine(image=first, outputs=("labels",))["labels"], copy)


def test_views_and_read_only_images_are_taken_and_left_alone(engine):
    image = pictures(1)
    expected = engine(image=image)["labels"]
    view = image[..., ::-1].copy()[..., ::-1]
    assert not view.flags.c_contiguous
    np.testing.assert_array_equal(engine(image=view)["labels"], expected)
    locked = np.frombuffer(image.tobytes(), np.uint8).reshape(image.shape)
    assert not locked.flags.writeable
    np.testing.assert_array_equal(engine(image=locked)["labels"], expected)
    assert locked.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({"image": np.zeros((1, 95, 128, 3), np.uint8)}, None, r"uint8 \[1, 95, 128, 3\]; the model takes"),
        ({"image": np.zeros((96, 128, 3), np.uint8)}, None, r"the model takes uint8 \[1, 96, 128, 3\]"),
        ({"image": np.zeros((1, 96, 128, 3), np.float32)}, None, "float32"),
        ({"image": [1, 2]}, None, "is list"),
        ({}, None, "'image' is missing"),
        ({"image": np.zeros((1, 96, 128, 3), np.uint8), "depth": np.zeros(1)}, None, "no input 'depth'"),
        ({"image": np.zeros((1, 96, 128, 3), np.uint8)}, ("depth",), "no output 'depth'"),
    ],
)
def test_wrong_input_is_refused_and_the_engine_goes_on(engine, inputs, outputs, message):
    with pytest.raises(EngineError, match=message):
        engine(outputs=outputs, **inputs)
    assert engine(image=pictures(1))["labels"].shape == (1, 96, 128)


def test_the_weights_are_not_cast_again_for_each_frame_by_onnxruntime(tiny_model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tiny_model), options, providers=["CPUExecutionProvider"])
    casts = [n for n in onnx.load(tmp_path / "optimised.onnx").graph.node if n.op_type == "Cast"]
    assert len(casts) <= 3, [list(n.input) for n in casts]  # the image, labels, confidence


def test_the_weights_are_not_cast_again_for_each_frame_by_openvino(tiny_model):
    openvino = pytest.importorskip("openvino")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(openvino.Core().read_model(tiny_model), "CPU", options)
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert kinds.count("Convert") <= 3, kinds  # the image, labels, confidence
    assert kinds.count("Softmax") == 0  # every attention is one fused kernel, the shifted windows' too


@pytest.fixture(scope="module")
def sample_frames():
    """Every 25th frame of the sample bag with its true labels: a list of (bgr, labels)."""
    from deeprob_perception.bags import open_bag
    from deeprob_perception.messages.cdr import deserialize, stamp_ns
    from deeprob_perception.messages.images import to_array, to_bgr
    from deeprob_perception.share import share_dir

    image_topic, truth_topic = "/camera/image_raw/compressed", "/ground_truth/mask/compressed"
    images, masks = {}, {}
    with open_bag(share_dir() / "bags" / "sample.mcap") as bag:
        for message in bag.messages([image_topic, truth_topic]):
            msg = deserialize(message.raw, message.topic.msgtype)
            (images if message.topic.name == image_topic else masks)[stamp_ns(msg.header)] = msg
    stamps = sorted(images.keys() & masks.keys())[::25]
    assert len(stamps) >= 10
    return [(to_bgr(images[stamp]), to_array(masks[stamp])) for stamp in stamps]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_openvino_loses_at_most_half_a_point_of_miou(precision, sample_frames, cache, tmp_path):
    """Against ONNX Runtime's fp32, by the tabletop model on the sample bag's ground truth."""
    from deeprob_perception import zoo
    from deeprob_perception.segmentation import Segmenter
    from deeprob_perception.segmentation.scores import Confusion

    if "tabletop" not in zoo.catalogue():
        pytest.skip("the tabletop model is not in models/")
    for backend in ("openvino", "onnxruntime"):
        if engines.unavailable(backend):
            pytest.skip(engines.unavailable(backend))
    model = zoo.resolve("tabletop")
    fast = engines.load(model, "openvino", precision, cache)
    if fast.precision != precision:
        pytest.skip(f"this CPU ({fast.device}) has no native {precision}: OpenVINO computes in {fast.precision}")
    miou = []
    for engine in (engines.load(model, "onnxruntime", "fp32"), fast):
        segmenter = Segmenter(engine)
        confusion = Confusion(len(segmenter.class_names))
        for bgr, truth in sample_frames:
            confusion.add(segmenter(bgr).labels, truth)
        miou.append(confusion.miou())
    print(f"mIoU {miou[0]:.4f} by onnxruntime fp32, {miou[1]:.4f} by openvino {precision}")
    assert miou[1] >= miou[0] - 0.005


def test_a_precision_the_cpu_lacks_is_said_never_silent(tiny_model, cache, caplog):
    openvino = pytest.importorskip("openvino")
    native = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    with caplog.at_level(logging.WARNING):
        engine = engines.load(tiny_model, "openvino", "bf16", cache, threads=1)
    assert engine.requested_precision == "bf16"
    if native:
        assert engine.precision == "bf16"
        assert not caplog.records
    else:
        assert engine.precision == "fp32"
        assert "asked for bf16" in caplog.text
        assert "computes in fp32" in caplog.text


def test_auto_precision_is_bf16_only_where_it_is_native(tiny_model, cache, caplog):
    openvino = pytest.importorskip("openvino")
    native = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    with caplog.at_level(logging.WARNING):
        assert engines.load(tiny_model, "openvino", "auto", cache).precision == ("bf16" if native else "fp32")
    assert not caplog.records


def test_onnxruntime_refuses_what_it_cannot_compute(tiny_model):
    pytest.importorskip("onnxruntime")
    with pytest.raises(EngineError, match="computes in fp32"):
        engines.load(tiny_model, "onnxruntime", "bf16")


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_precision_that_the_file_lacks_is_refused_with_what_makes_it(tiny_model, backend):
    with pytest.raises(EngineError, match=r"tiny\.onnx is a model file in fp32; `deeprob quantize tiny\.onnx"):
        engines.load(tiny_model, backend, "int8")


def test_openvino_refuses_fp16(tiny_model):
    pytest.importorskip("openvino")
    with pytest.raises(EngineError, match=r"openvino computes in .*bf16.*, int8, not in fp16"):
        engines.load(tiny_model, "openvino", "fp16")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_lowered_for_another_back_end_is_refused(tiny_model, tmp_path, backend):
    proto = onnx.load(tiny_model)
    proto.metadata_props.add(key="deeprob.precision", value="fp16")
    onnx.save(proto, tmp_path / "lowered.onnx")
    with pytest.raises(EngineError, match=r"lowered\.onnx is a model file in fp16; .* takes the fp32 file"):
        engines.load(tmp_path / "lowered.onnx", backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorflow"}, "unknown back end 'tensorflow'; there are: auto, tensorrt, openvino, onnxruntime, torch"),
        ({"precision": "f8"}, "unknown precision 'f8'; there are: auto, fp32"),
        ({"threads": -1}, "threads is -1"),
    ],
)
def test_unknown_options_list_the_known_ones(tiny_model, options, message):
    with pytest.raises(EngineError, match=message):
        engines.load(tiny_model, **options)


@pytest.mark.parametrize("backend", engines.BACKENDS)
def test_a_missing_back_end_is_one_clear_line(tiny_model, monkeypatch, backend):
    # What `import` then raises is an ImportError. TensorRT's first need is CUDA's bindings.
    monkeypatch.setitem(sys.modules, "cuda.bindings" if backend == "tensorrt" else backend, None)
    if backend == "tensorrt":
        with pytest.raises(EngineError, match=r"tensorrt cannot be used: .*pip install cuda-bindings"):
            engines.load(tiny_model, backend)
        return
    with pytest.raises(EngineError, match=f"{backend} cannot be used: .*pip install {backend}") as raised:
        engines.load(tiny_model, backend)
    assert "\n" not in str(raised.value)


def test_auto_takes_the_next_back_end_and_says_why(tiny_model, monkeypatch, caplog):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with caplog.at_level(logging.INFO, "deeprob_perception.engines"):
        assert engines.load(tiny_model).backend == "onnxruntime"
    assert "openvino cannot be used" in caplog.text


@pytest.mark.parametrize(("machine", "first"), [("x86_64", "openvino"), ("aarch64", "onnxruntime")])
def test_auto_tries_first_what_the_processor_makes_likely(monkeypatch, machine, first):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(engines, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(engines, "unavailable", lambda name: "no GPU" if name == "tensorrt" else None)
    assert engines.choose()[0][0] == first


def test_auto_takes_tensorrt_where_there_is_a_gpu_for_it(monkeypatch):
    monkeypatch.setattr(engines, "unavailable", lambda name: None)
    assert engines.choose() == (["tensorrt"], "auto: there is an NVIDIA GPU, and TensorRT for it")


def a_gpu_without_memory(monkeypatch):
    from deeprob_perception.engines import tensorrt

    def load(*_):
        raise EngineError("CUDA: out of memory: 48 MB for the network's buffers")

    monkeypatch.setattr(tensorrt, "unavailable", lambda: None)
    monkeypatch.setattr(tensorrt, "load", load)


def test_auto_goes_on_with_the_cpu_where_the_gpus_engine_cannot_be_loaded(tiny_model, cache, monkeypatch, caplog):
    a_gpu_without_memory(monkeypatch)
    with caplog.at_level(logging.WARNING, "deeprob_perception.engines"):
        engine = engines.load(tiny_model, cache_dir=cache)
    assert engine.backend in engines.CPU_BACKENDS
    assert "tiny.onnx: CUDA: out of memory" in caplog.text and "going on with" in caplog.text


def test_a_back_end_that_was_named_is_not_replaced(tiny_model, cache, monkeypatch):
    a_gpu_without_memory(monkeypatch)
    with pytest.raises(EngineError, match="out of memory"):
        engines.load(tiny_model, "tensorrt", cache_dir=cache)


def test_no_back_end_at_all_says_what_to_install(monkeypatch):
    monkeypatch.setattr(engines, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(engines, "unavailable", lambda name: "gone")
    with pytest.raises(EngineError, match="pip install onnxruntime"):
        engines.choose()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_model_is_refused_by_name(tiny_model, tmp_path, share):
    content = tiny_model.read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match=r"cut\.onnx (is empty|is damaged|is an ONNX file, but not one of ours)"):
        engines.load(path)


@pytest.mark.parametrize("content", [b"\x00" * 100, b"hello, world", b"\x80\x02}q\x00.", b"<html></html>"])
def test_what_is_no_onnx_is_refused_by_name(tmp_path, content):
    path = tmp_path / "other.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"other\.onnx is damaged or no ONNX file"):
        engines.load(path)


def test_a_missing_model_and_a_folder_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"no model file .*absent\.onnx"):
        engines.load(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        engines.load(tmp_path)


def test_a_foreign_onnx_is_refused(tmp_path):
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 3]) for n in "xy"]
    path = tmp_path / "foreign.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", value[:1], value[1:])), path)
    with pytest.raises(ModelError, match=r"foreign\.onnx is an ONNX file, but not one of ours"):
        engines.load(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("contract", "2", "follows contract '2'"),
        ("task", "dance", "task 'dance'"),
        ("classes", None, "lacks the metadata deeprob.classes"),
        ("classes", "{", "no JSON"),
        ("classes", '"ball"', "no list of names"),
        ("palette", "[[0, 0, 0]]", "not 7 colours"),
        ("palette", "[[0, 0, 999], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]", "0..255"),
        ("palette", "[[0, 0], [0]]", "no JSON|not 7 colours"),
    ],
)
def test_wrong_metadata_is_refused(tiny_model, tmp_path, key, value, message):
    proto = onnx.load(tiny_model)
    for i, prop in enumerate(proto.metadata_props):
        if prop.key == f"deeprob.{key}":
            if value is None:
                del proto.metadata_props[i]
            else:
                prop.value = value
            break
    path = tmp_path / "changed.onnx"
    onnx.save(proto, path)
    with pytest.raises(ModelError, match=message):
        engines.load(path)


def test_a_model_with_other_inputs_or_outputs_is_refused(tiny_model, tmp_path):
    def refused(change, message):
        proto = onnx.load(tiny_model)
        change(proto.graph)
        onnx.save(proto, tmp_path / "changed.onnx")
        with pytest.raises(ModelError, match=message):
            engines.load(tmp_path / "changed.onnx")

    refused(lambda g: g.output.pop(), "no output 'confidence'")
    refused(lambda g: setattr(g.input[0].type.tensor_type, "elem_type", onnx.TensorProto.FLOAT), "not uint8")
    refused(lambda g: g.input[0].type.tensor_type.shape.dim[1].__setattr__("dim_param", "H"), "no fixed shape")
    refused(lambda g: setattr(g.input[0], "name", "picture"), "inputs are")


def test_a_graph_that_the_back_end_cannot_run_is_a_model_error(tiny_model, tmp_path, engine):
    if engine.backend == "torch":
        pytest.skip("torch builds the network from the file's recipe and reads weights only")
    proto = onnx.load(tiny_model)
    next(n for n in proto.graph.node if n.op_type == "Softmax").op_type = "Hardmost"
    onnx.save(proto, tmp_path / "changed.onnx")
    with pytest.raises((ModelError, EngineError), match=r"changed\.onnx"):
        engines.load(tmp_path / "changed.onnx", engine.backend, cache_dir=tmp_path)


@pytest.mark.skipif(engines.unavailable("openvino") is not None, reason="needs openvino")
class TestOpenVinoCache:
    def test_a_second_start_reads_the_cache_and_a_damaged_one_is_made_anew(self, tiny_model, tmp_path):
        image = pictures(1)
        expected = engines.load(tiny_model, "openvino", "fp32", tmp_path)(image=image, outputs=("labels",))["labels"]
        blobs = [f for f in tmp_path.rglob("*") if f.is_file()]
        assert blobs
        written = [f.stat().st_mtime_ns for f in blobs]
        again = engines.load(tiny_model, "openvino", "fp32", tmp_path)(image=image, outputs=("labels",))["labels"]
        assert [f.stat().st_mtime_ns for f in blobs] == written
        np.testing.assert_array_equal(again, expected)
        for damage in (b"", b"garbage", blobs[0].read_bytes()[:1000]):
            for blob in blobs:
                blob.write_bytes(damage)
            anew = engines.load(tiny_model, "openvino", "fp32", tmp_path)(image=image, outputs=("labels",))["labels"]
            np.testing.assert_array_equal(anew, expected)

    def test_a_folder_that_cannot_be_written_is_said_and_done_without(self, tiny_model, tmp_path, caplog):
        (tmp_path / "file").write_text("")
        with caplog.at_level(logging.WARNING):
            engine = engines.load(tiny_model, "openvino", "fp32", tmp_path / "file")
        assert "every start compiles anew" in caplog.text
        assert engine(image=pictures(1))["labels"].shape == (1, 96, 128)


def test_a_robot_needs_no_torch(tiny_model, tmp_path):
    code = f"""
import sys
import numpy as np
from deeprob_perception import engines
from deeprob_perception.segmentation import Segmenter
for backend in ("auto", *engines.BACKENDS):
    if backend == "auto" or backend != "torch" and engines.unavailable(backend) is None:
        segmenter = Segmenter(engines.load({str(tiny_model)!r}, backend, cache_dir={str(tmp_path)!r}, threads=1))
        segmenter(np.zeros((48, 64, 3), np.uint8))
loaded = [name for name in ("torch", "rclpy", "onnxscript") if name in sys.modules]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
