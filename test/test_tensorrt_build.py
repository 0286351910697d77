# SPDX-License-Identifier: Apache-2.0
"""Building by a real TensorRT, which needs no GPU: TensorRT for RTX takes every model; what is built is checked and kept."""

import contextlib
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from deeprob_perception import engines, zoo
from deeprob_perception.engines import builder, lowering, model_file, parity, tensorrt_library
from deeprob_perception.engines.cache import EngineCache
from deeprob_perception.errors import EngineError

RTX = [library for library in tensorrt_library.libraries()[0] if library.builds_anywhere]
pytestmark = pytest.mark.skipif(not RTX, reason=f"needs TensorRT for RTX: {tensorrt_library.libraries()[1]}")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_120")


@pytest.fixture
def far():
    """A target that is not in this machine, so that a GPU changes nothing here."""
    return builder.Target("sm_86", "", RTX[0], False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("deeprob_perception.engines.cuda.unavailable", lambda: "no GPU in this test")


@pytest.mark.parametrize("sm", TARGETS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["street", "street-cnn", "tabletop", "swin-tiny with upernet"])
def test_every_model_is_built_for_every_gpu(name, precision, sm, request):
    if "upernet" in name:
        path = request.getfixturevalue("upernet_model")
    elif name in zoo.catalogue():
        path = zoo.resolve(name)
    else:
        pytest.skip(f"the model {name} is not in models/")
    proto = model_file.parse(path)
    plan = builder.serialise(lowering.lower(proto, precision), builder.Target(sm, "", RTX[0], False), path.name)
    # Half of the file's weights at least must be in it.
    assert len(plan) > path.stat().st_size * (0.9 if precision == "fp16" else 1.8)


def test_bf16_is_built(tiny_model, far):
    assert builder.serialise(lowering.lower(model_file.parse(tiny_model), "bf16"), far, "tiny.onnx")


@pytest.mark.parametrize("operator", ["Hardmost", "Det"])
def test_an_operator_that_tensorrt_does_not_have_is_named(tiny_model, far, operator):
    """One that nobody has, and one of ONNX's own that TensorRT lacks."""
    proto = model_file.parse(tiny_model)
    next(n for n in proto.graph.node if n.op_type == "Softmax").op_type = operator
    expected = rf"cannot take tiny\.onnx: the operator {operator} \(node .*softmax.*not supported"
    with pytest.raises(EngineError, match=expected) as e:
        builder.serialise(proto, far, "tiny.onnx")
    assert "\n" not in str(e.value)


def test_what_the_builder_refuses_is_one_line(tiny_model, far, monkeypatch):
    builder_class = far.library.module.Builder
    monkeypatch.setattr(builder_class, "build_serialized_network", lambda *_: None)
    with pytest.raises(EngineError, match=r"cannot build tiny\.onnx for sm_86: "):
        builder.serialise(model_file.parse(tiny_model), far, "tiny.onnx")


class TestTarget:
    @pytest.mark.parametrize("text", ["sm_86", "86", "8.6", "SM86", " sm_86 "])
    def test_spellings(self, text, no_gpu):
        assert builder.find_target(text) == builder.Target("sm_86", "", RTX[0], False)

    def test_two_digits(self, no_gpu):
        assert builder.find_target("12.0").sm == "sm_120"

    @pytest.mark.parametrize("text", ["", "ampere", "sm_", "8", "sm_86a", "8.60.1"])
    def test_nonsense(self, text, no_gpu):
        with pytest.raises(EngineError, match="give a compute capability, such as sm_86"):
            builder.find_target(text)

    def test_one_that_tensorrt_for_rtx_does_not_build_for(self, no_gpu):
        with pytest.raises(EngineError, match=r"builds for sm_75, sm_80, sm_86, .*, not for sm_87"):
            builder.find_target("sm_87")

    def test_no_gpu_and_no_target(self, no_gpu):
        with pytest.raises(EngineError, match=r"no GPU to build for \(no GPU in this test\); name a target: sm_75, sm_80"):
            builder.find_target()

    @pytest.fixture
    def plain(self, monkeypatch):
        """A machine with plain TensorRT and an Orin in it."""
        library = tensorrt_library.Library(SimpleNamespace(), "tensorrt", "10.3.0")
        gpu = SimpleNamespace(sm="sm_87", name="Orin")
        monkeypatch.setattr(tensorrt_library, "libraries", lambda: ((library,), ""))
        monkeypatch.setattr("deeprob_perception.engines.cuda.unavailable", lambda: None)
        monkeypatch.setattr("deeprob_perception.engines.cuda.Cuda", lambda: SimpleNamespace(gpu=lambda: gpu))
        return library

    def test_plain_tensorrt_builds_for_the_gpu_in_the_machine(self, plain):
        expected = builder.Target("sm_87", "Orin", plain, True)
        assert builder.find_target() == builder.find_target("sm_87") == expected
        assert str(expected) == "Orin (sm_87)"

    def test_plain_tensorrt_refuses_other_gpus(self, plain):
        with pytest.raises(EngineError, match=r"TensorRT 10\.3\.0 builds only for the GPU in the machine"):
            builder.find_target("sm_86")

    def test_a_gpu_that_tensorrt_for_rtx_does_not_know_is_refused_in_clear(self, monkeypatch, plain):
        monkeypatch.setattr(tensorrt_library, "libraries", lambda: ((RTX[0],), ""))
        with pytest.raises(EngineError, match=r"builds for sm_75, .*, not for sm_87"):
            builder.find_target()


def test_an_engine_is_built_compared_and_kept(tiny_model, far, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(builder, "EVERY", 0.05)
    model = model_file.read(tiny_model)
    with caplog.at_level(logging.INFO):
        entry = builder.build(model, "auto", far, tmp_path)
    assert "building tiny fp16 for sm_86, " in caplog.text and "this is normal" in caplog.text
    assert (entry.built, entry.facts["precision"], entry.facts["requested_precision"]) == (True, "fp16", "fp16")
    assert entry.facts["fallbacks"] == [] and entry.facts["shortfall"] is None
    found = parity.Parity(**entry.facts["parity"])
    assert found.agreement > 0.99 and found.nans == 0 and found.frames == 4
    assert "onnxruntime on the fp16 graph" in found.measured_by
    assert entry.facts["key"]["model_sha256"] == zoo.checksum(tiny_model)
    again = builder.build(model, "fp16", far, tmp_path)
    assert not again.built and again.plan == entry.plan
    assert builder.build(model, "fp16", far, tmp_path, rebuild=True).built


def test_two_processes_build_one_real_engine(tiny_model, tmp_path):
    code = f"""
import logging, pathlib
logging.basicConfig(level=logging.INFO)
from deeprob_perception.engines import builder, cuda, model_file
cuda.unavailable = lambda: "no GPU in this test"
model, cache = model_file.read({str(tiny_model)!r}), pathlib.Path({str(tmp_path)!r})
entry = builder.build(model, "fp32", builder.find_target("sm_89"), cache)
print(entry.built, len(entry.plan))
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    outs = [p.communicate(timeout=200) for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    assert sorted(out.split()[0] for out, _ in outs) == ["False", "True"]
    assert len({out.split()[1] for out, _ in outs}) == 1
    assert sum("building tiny fp32 for sm_89\n" in err for _, err in outs) == 1


@pytest.fixture
def overflowing(tiny_model, tmp_path):
    """A model whose products leave fp16's range, and not bf16's: what feeds each MLP's second matrix is 1e6 times as large."""
    proto = model_file.parse(tiny_model)
    changed = 0
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name.endswith("stages.0.blocks.0.mlp.fc1.bias"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(array + np.float32(60000), tensor.name))
            changed += 1
        if tensor.name.endswith("stages.0.blocks.0.mlp.fc2.weight"):
            # Alike in all inputs, so that the products add up beyond 65504, and so small that the network stays sane.
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full_like(array, 0.02), tensor.name))
            changed += 1
    assert changed == 2
    path = tmp_path / "overflowing.onnx"
    onnx.save(proto, path)
    return model_file.read(path)


def test_fp16_that_overflows_falls_back_and_says_so(overflowing, far, tmp_path, caplog):
    entry = builder.build(overflowing, "fp16", far, tmp_path)
    assert entry.facts["requested_precision"] == "fp16"
    assert entry.facts["precision"] in ("bf16", "fp32")
    assert entry.facts["fallbacks"][0].startswith("fp16: ") and "are no numbers (overflow)" in entry.facts["fallbacks"][0]
    assert "fp16 is not to be trusted" in caplog.text and "building bf16 instead" in caplog.text
    assert entry.facts["parity"]["nans"] == 0
    # It is kept under what was asked for, so that the next start neither builds nor asks again.
    assert not builder.build(overflowing, "fp16", far, tmp_path).built


def shorten(monkeypatch, *precisions):
    """Let precisions fall short, whatever they answer."""
    monkeypatch.setattr(parity.Parity, "shortfall", lambda self, p: "made to" if p in precisions else None)


def test_the_order_of_fallbacks(tiny_model, far, tmp_path, monkeypatch):
    shorten(monkeypatch, "fp16", "bf16")
    entry = builder.build(model_file.read(tiny_model), "fp16", far, tmp_path)
    assert entry.facts["precision"] == "fp32"
    assert entry.facts["fallbacks"] == ["fp16: made to", "bf16: made to"]


def test_turing_is_built_in_fp16_and_its_fp32_is_refused_in_clear(tiny_model):
    """TensorRT for RTX has no fp32 products for sm_75."""
    turing = builder.Target("sm_75", "", RTX[0], False)
    proto = model_file.parse(tiny_model)
    assert builder.serialise(lowering.lower(proto, "fp16"), turing, "tiny.onnx")
    with pytest.raises(EngineError, match=r"cannot build tiny\.onnx for sm_75: .*FP32 GEMM is not supported"):
        builder.serialise(proto, turing, "tiny.onnx")


def test_bf16_is_passed_over_on_a_gpu_without_it(tiny_model, tmp_path, monkeypatch):
    shorten(monkeypatch, "fp16")
    monkeypatch.setattr(builder, "serialise", lambda *_: b"an engine")
    entry = builder.build(model_file.read(tiny_model), "fp16", builder.Target("sm_75", "", RTX[0], False), tmp_path)
    assert entry.facts["precision"] == "fp32"
    assert entry.facts["fallbacks"] == ["fp16: made to"]


def test_a_parser_without_bf16_leaves_fp32(tiny_model, far, tmp_path, monkeypatch):
    shorten(monkeypatch, "fp16")
    real = builder.serialise

    def serialise(proto, target, name):
        if lowering.precision_of(proto) == "bf16":
            raise EngineError("the operator Conv is not supported")
        return real(proto, target, name)

    monkeypatch.setattr(builder, "serialise", serialise)
    entry = builder.build(model_file.read(tiny_model), "fp16", far, tmp_path)
    assert entry.facts["precision"] == "fp32"
    assert entry.facts["fallbacks"][1] == "bf16: the operator Conv is not supported"


def test_fp32_that_falls_short_is_built_and_said(tiny_model, far, tmp_path, monkeypatch, caplog):
    shorten(monkeypatch, "fp32")
    entry = builder.build(model_file.read(tiny_model), "fp32", far, tmp_path)
    assert (entry.facts["precision"], entry.facts["shortfall"]) == ("fp32", "made to")
    assert "even in fp32 made to" in caplog.text


def test_without_onnxruntime_it_is_built_and_said_to_be_unchecked(tiny_model, far, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    entry = builder.build(model_file.read(tiny_model), "fp16", far, tmp_path)
    assert entry.plan and entry.facts["parity"] is None
    assert "not compared with fp32" in caplog.text


@pytest.fixture(scope="module")
def quantised(tiny_model, tmp_path_factory):
    """The test model in int8, symmetric, by ONNX Runtime's own quantiser: what TensorRT can take."""
    pytest.importorskip("onnxruntime.quantization")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.frames = iter(parity.synthetic((1, 96, 128, 3), 4).images)

        def get_next(self):
            frame = next(self.frames, None)
            return None if frame is None else {"image": frame}

    path = tmp_path_factory.mktemp("int8") / "tiny-int8.onnx"
    quantize_static(
        tiny_model, path, Reader(), QuantFormat.QDQ, ["MatMul", "Conv"], per_channel=True, activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )  # fmt: skip
    proto = onnx.load(path)
    for key, value in model_file.read(tiny_model).metadata.items():
        if f"deeprob.{key}" not in {p.key for p in proto.metadata_props}:
            proto.metadata_props.add(key=f"deeprob.{key}", value=value)
    proto.metadata_props.add(key="deeprob.precision", value="int8")
    onnx.save(proto, path)
    return path


class TestInt8:
    def test_without_a_quantiser_it_says_what_to_do(self, tiny_model, far, tmp_path):
        with pytest.raises(EngineError, match=r"needs frames to calibrate on: `deeprob build .*--calibration"):
            builder.build(model_file.read(tiny_model), "int8", far, tmp_path)

    def test_a_quantised_file_is_built_as_it_is(self, quantised, far, tmp_path):
        entry = builder.build(model_file.read(quantised), "auto", far, tmp_path)
        assert (entry.facts["precision"], entry.facts["requested_precision"]) == ("int8", "int8")
        assert entry.facts["parity"] is None, "the file was compared with itself, which says nothing of fp32"

    def test_a_quantised_file_has_no_other_precision(self, quantised, far, tmp_path):
        with pytest.raises(EngineError, match=r"tiny-int8\.onnx is in int8 already; ask for int8, or give the fp32 file"):
            builder.build(model_file.read(quantised), "fp16", far, tmp_path)

    def test_an_fp32_file_is_quantised_on_the_way(self, tiny_model, quantised, far, tmp_path):
        def quantise(model, out):
            assert model == tiny_model
            out.write_bytes(quantised.read_bytes())
            return out

        entry = builder.build(model_file.read(tiny_model), "int8", far, tmp_path, quantise=quantise)
        assert entry.facts["requested_precision"] == "int8"
        assert entry.facts["parity"]["agreement"] > 0.5
        assert entry.facts["key"]["model_sha256"] == zoo.checksum(tiny_model)  # what a node looks it up by

    def test_poor_int8_falls_back_to_fp16(self, tiny_model, quantised, far, tmp_path, monkeypatch):
        shorten(monkeypatch, "int8")
        entry = builder.build(model_file.read(tiny_model), "int8", far, tmp_path,
                              quantise=lambda model, out: Path(out.write_bytes(quantised.read_bytes()) and out))
        assert entry.facts["precision"] == "fp16"


class TestParity:
    LABELS = np.zeros((1, 4, 4), np.uint8)
    SURE = np.full((1, 4, 4), 200, np.uint8)

    def measured(self, labels, confidence, truth=None, expected=None):
        samples = parity.Samples([np.zeros((1, 4, 4, 3), np.uint8)], "a test", [truth])
        expected = expected or [(self.LABELS, self.SURE)]
        return parity.measure(expected, lambda image: (labels, confidence), samples, "hand")

    def test_figures(self):
        labels, confidence = self.LABELS.copy(), self.SURE.copy()
        labels[0, 0, :2] = 1
        confidence[0, 0, 0] = 149  # 51 of 255 less
        found = self.measured(labels, confidence)
        assert found.agreement == 14 / 16
        assert found.max_error == pytest.approx(0.2)
        assert found.mean_error == pytest.approx(0.2 / 16)
        assert (found.nans, found.miou) == (0, None)
        assert found.shortfall("fp16") == "only 87.50% of the labels are those of fp32; 99.0% are asked for"

    def test_no_number_is_counted_and_never_trusted(self):
        confidence = self.SURE.copy()
        confidence[0, 1] = 0
        found = self.measured(self.LABELS, confidence)
        assert found.nans == 4
        assert "4 pixels of 1 frames are no numbers" in found.shortfall("fp32")

    def test_mean_iou_is_that_of_the_scores(self):
        from deeprob_perception.segmentation.scores import Confusion

        random = np.random.default_rng(0)
        labels, reference = (random.integers(0, 3, (1, 4, 4)).astype(np.uint8) for _ in range(2))
        truth = random.integers(0, 3, (4, 4)).astype(np.uint8)
        truth[0] = 255
        found = self.measured(labels, self.SURE, truth, [(reference, self.SURE)])
        for ours, theirs in ((found.miou, labels), (found.reference_miou, reference)):
            confusion = Confusion(3)
            confusion.add(theirs[0], truth)
            assert ours == pytest.approx(confusion.miou())

    def test_a_lost_point_of_iou_falls_short_though_the_labels_agree(self):
        truth = np.zeros((4, 4), np.uint8)
        found = parity.Parity(0.995, 0.1, 0.01, 0, 0.70, 0.72, 1, "x", "y")
        assert "mean IoU is 0.700, in fp32 0.720" in found.shortfall("fp16")
        assert self.measured(self.LABELS, self.SURE, truth).shortfall("fp16") is None


def run(*arguments):
    done = subprocess.run([sys.executable, "-m", "deeprob_perception", *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


class TestCommand:
    @pytest.fixture(autouse=True)
    def setting(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")

    def test_build_and_info(self, tiny_model, tmp_path):
        target = ("--target", "sm_86", "--target", "sm_120", "--json", tmp_path / "built.json")
        status, out, err = run("build", tiny_model, *target)
        assert status == 0, err
        assert "building tiny fp16 for sm_86" in err
        assert "fp16 for sm_120, TensorRT for RTX" in out and "% of labels as in fp32" in out and "the sample bag" in out
        built = json.loads((tmp_path / "built.json").read_text())
        assert [b["key"]["target"] for b in built] == ["sm_86", "sm_120"]
        assert all(Path(b["path"]).is_file() and b["built_now"] for b in built)
        assert built[0]["parity"]["frames"] == 8
        status, out, err = run("models", "info", tiny_model)
        assert "fp16 for sm_86" in out and "% of labels as in fp32" in out, err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--target", "sm_87"], "builds for sm_75"),
            (["--target", "orin"], "give a compute capability"),
            (["--precision", "f16", "--target", "sm_86"], "unknown precision 'f16'; there are: auto, fp32"),
            (["--precision", "int8", "--target", "sm_86"], "give --calibration FOLDER_OR_BAG"),
            ([], "name a target: sm_75"),
            (["--calibration", "absent", "--target", "sm_86"], "there is no absent; give a folder of images or a bag"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, tiny_model, arguments, message):
        status, _, err = run("build", tiny_model, *arguments)
        assert status == 2
        assert message in err.replace("\n", " ")
        assert "Traceback" not in err

    def test_where_it_cannot_be_kept_the_command_fails(self, tiny_model, tmp_path):
        (tmp_path / "file").write_text("")
        status, _, err = run("build", tiny_model, "--target", "sm_86", "--cache-dir", tmp_path / "file")
        assert status == 2
        assert "could not be kept" in err


def test_samples_come_from_a_folder_a_data_set_and_a_bag(tiny_model, tmp_path):
    import cv2

    from deeprob_perception.samples import read_samples

    model = model_file.read(tiny_model)
    found = read_samples(model)
    assert [i.shape for i in found.images] == [(1, 96, 128, 3)] * 8
    assert [t.shape for t in found.truth] == [(96, 128)] * 8  # the classes are the sample bag's
    assert max(int(t.max()) for t in found.truth) < 7
    for i in range(5):
        for folder in ("plain", "data/images", "data/labels"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            shape = (48, 64) if folder.endswith("labels") else (48, 64, 3)
            cv2.imwrite(str(tmp_path / folder / f"{i}.png"), np.full(shape, i, np.uint8))
    plain = read_samples(model, tmp_path / "plain", 3)
    assert [int(i[0, 0, 0, 0]) for i in plain.images] == [0, 1, 2]
    assert list(plain.truth) == [None] * 3
    labelled = read_samples(model, tmp_path / "data", 8)
    assert [int(t[0, 0]) for t in labelled.truth] == [0, 1, 2, 3, 4]


def test_the_cache_is_the_users_own_unless_one_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert EngineCache().folder == tmp_path / "deeprob_perception" / "tensorrt"
    assert EngineCache(tmp_path / "mine").folder == tmp_path / "mine" / "tensorrt"


def test_loading_nothing_of_the_gpu_reads_no_tensorrt():
    """`engines` and a CPU back end must not pay for TensorRT's import."""
    code = "import sys\nfrom deeprob_perception import engines\nengines.choose()\n" \
           "sys.exit([m for m in ('tensorrt', 'tensorrt_rtx', 'torch') if m in sys.modules] or 0)"
    with contextlib.suppress(EngineError):
        if engines.unavailable("tensorrt") is None:
            pytest.skip("there is a GPU here, so TensorRT is asked")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
