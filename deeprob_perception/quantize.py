# SPDX-License-Identifier: Apache-2.0
"""A model file in fp32 -> one in int8: post-training quantisation by NNCF, calibrated on frames of the robot's own camera.

The matrix products and convolutions are quantised: weights by output channel, activations by tensor, all symmetric and
signed (zero points of 0), as QuantizeLinear and DequantizeLinear nodes. Symmetric for two reasons: TensorRT parses nothing
else, and OpenVINO's int8 products with asymmetric activations take as long as its bf16 ones. Attention between tokens and
all that is pointwise stay float: quantising the products of activations with activations gained no time and cost labels.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deeprob_perception.bags import open_bag
from deeprob_perception.bags.from_images import IMAGE_SUFFIXES
from deeprob_perception.bags.reader import natural_order
from deeprob_perception.engines import model_file
from deeprob_perception.engines.model_file import PREFIX
from deeprob_perception.errors import DataError, ModelError
from deeprob_perception.messages.cdr import deserialize
from deeprob_perception.messages.images import to_bgr
from deeprob_perception.zoo import checksum, keep

FRAMES = 64  # by default; NNCF's own default is 300, which took longer and changed nothing that could be measured
# Names of a network's parameters in our files begin so; other constants (pooling matrices, shapes) are not for quantising.
WEIGHTS = ("backbone.", "head.")
# What only moves values: zeros that pad are zeros when they are quantised too.
LAYOUT = {"Reshape", "Transpose", "Pad"}
# What stands between a stored weight and the product that reads it: half floats' casts, transposes, cuts and flips.
PREPARATIONS = {"Cast", "Transpose", "Split", "Slice", "Reshape", "Identity"}


def quantize(model: Path, frames: Iterable[np.ndarray], out: Path, source: str = "frames") -> Path:
    """Write an int8 model file that every engine reads as it reads the fp32 one: same input, outputs and metadata.

    `deeprob.precision` becomes `int8`, the name gets `-int8` at its end, and `deeprob.calibration` (JSON: method, frames,
    source, date, sha256 of the fp32 file) tells how it was made. The metrics stay those of the fp32 file.

    :param model: a fp32 model file of ours.
    :param frames: uint8 `[1, H, W, 3]` BGR of the model's size, such as `calibration_frames` gives: some dozens of frames
        that look like what the robot will see.
    :param source: what the frames are, for the metadata.
    :returns: `out`. The file appears whole or not at all.
    :raises ModelError: when the file is not ours or not fp32, NNCF is not installed or fails, or `out` cannot be written.
    :raises DataError: when there is no frame, or one is not of the model's size.
    """
    described = model_file.read(model)
    if described.precision != "fp32":
        raise ModelError(f"{model} is in {described.precision} already; give the fp32 file that it was made from")
    images = []
    for image in frames:
        if image.dtype != np.uint8 or image.shape != described.inputs[0].shape:
            found = f"{image.dtype} {list(image.shape)}"
            raise DataError(f"a calibration frame is {found}; {model.name} takes {described.inputs[0]}")
        images.append(image)
    if not images:
        raise DataError(f"there are no frames to calibrate {model.name} on")
    proto = model_file.parse(model)
    weights = fold_weights(proto)
    kept = [(prop.key, prop.value) for prop in proto.metadata_props]
    proto = quantized(proto, weights, images)
    make_signed(proto)
    quantise_late(proto)
    calibration = {
        "method": f"nncf {version('nncf')} post-training, symmetric int8, weights by channel",
        "frames": len(images),
        "source": source,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "model_sha256": checksum(model),
    }
    changed = {
        "name": f"{described.metadata['name']}-int8",
        "precision": "int8",
        "calibration": json.dumps(calibration),
    }
    del proto.metadata_props[:]
    for key, value in {**dict(kept), **{PREFIX + key: value for key, value in changed.items()}}.items():
        proto.metadata_props.add(key=key, value=value)
    check(proto, model)
    keep(Path(out), proto.SerializeToString())
    return Path(out)


def fold_weights(proto: Any) -> set[str]:
    """Compute once what the graph makes of weights alone, so that products read constants; return the constants' names.

    Masks and position biases, which are made of weights and shapes, are left to be computed while loading: as constants
    they would be larger than all the weights.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    weights = {name for name in constants if name.startswith(WEIGHTS)}
    left = []
    for node in graph.node:
        reads = [name for name in node.input if name]
        if node.op_type not in PREPARATIONS or not reads or not all(name in constants for name in reads):
            left.append(node)
            continue
        results = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output]
        part = onnx.helper.make_graph([node], "part", [], results, [constants[name] for name in set(reads)])
        values = ReferenceEvaluator(onnx.helper.make_model(part, opset_imports=proto.opset_import)).run(None, {})
        for name, value in zip(node.output, values, strict=True):
            constants[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
        if weights & set(reads):
            weights |= set(node.output)
    used = {name for node in left for name in node.input}
    del graph.node[:], graph.initializer[:]
    graph.node.extend(left)
    graph.initializer.extend(tensor for name, tensor in constants.items() if name in used)
    for i in reversed(range(len(graph.value_info))):
        if graph.value_info[i].name in constants:
            del graph.value_info[i]
    return weights & used


def quantized(proto: Any, weights: set[str], images: list[np.ndarray]) -> Any:
    """Return the graph with Q/DQ nodes around every product and convolution of a weight."""
    # NNCF reports its use to its makers over the network, but not where this says that a machine does the asking.
    os.environ.setdefault("NNCF_CI", "1")
    try:
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters
    except ImportError as error:
        raise ModelError(f"quantising needs nncf ({error}): pip install 'deeprob_perception[quantize]'") from error
    nncf.set_log_level(logging.ERROR)
    floats = [n.name for n in proto.graph.node if n.op_type == "MatMul" and not weights & set(n.input)]
    try:
        return nncf.quantize(
            proto,
            nncf.Dataset(images, lambda image: {"image": image}),
            preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric activations too
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=floats, validate=False) if floats else None,
            advanced_parameters=AdvancedQuantizationParameters(
                # Smoothing adds a multiplication before each product, and gained less than a tenth of a point of agreement.
                smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
            ),
        )
    except Exception as error:  # NNCF raises errors of a dozen classes, and those of ONNX Runtime
        raise ModelError(f"NNCF cannot quantise this model: {(str(error).strip() or repr(error)).splitlines()[0]}") from error


def make_signed(proto: Any) -> None:
    """Give what is quantised without a sign (behind a ReLU) one, at half the resolution: TensorRT knows int8 only."""
    import onnx

    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    done: set[str] = set()
    for node in proto.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        scale, zero = (constants[name] for name in node.input[1:3])
        if zero.data_type != onnx.TensorProto.UINT8 or zero.name in done:
            continue
        done.add(zero.name)
        values = onnx.numpy_helper.to_array(scale) * np.float32(255 / 127)
        scale.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), scale.name))
        zero.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tuple(zero.dims), np.int8), zero.name))


def quantise_late(proto: Any) -> None:
    """Move each quantisation behind the window layout (padding, rolling, partition) that NNCF put it before.

    The values are the same. But OpenVINO 2026.4 computes padded windows wrongly the other way (a network with random weights
    kept 71 % of its labels, and 96 % this way, as in ONNX Runtime both ways), and it moves bf16 faster than int8.
    """
    nodes = list(proto.graph.node)
    for dequantise in [node for node in nodes if node.op_type == "DequantizeLinear"]:
        makers = {name: node for node in nodes for name in node.output}
        readers: dict[str, list[Any]] = {}
        for node in nodes:
            for name in dict.fromkeys(node.input):
                readers.setdefault(name, []).append(node)
        quantise = makers.get(dequantise.input[0])
        start = dequantise.output[0]
        if quantise is None or len(readers[quantise.output[0]]) != 1 or quantise.input[0] not in makers:
            continue  # of a weight
        end = behind_layout(start, readers)
        if end == start:
            continue
        for node in readers[start]:
            node.input[:] = [quantise.input[0] if name == start else name for name in node.input]
        for node in readers[end]:
            node.input[:] = [start if name == end else name for name in node.input]
        quantise.input[0] = end
        nodes.remove(quantise)
        nodes.remove(dequantise)
        place = nodes.index(makers[end]) + 1
        nodes[place:place] = [quantise, dequantise]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def behind_layout(name: str, readers: dict[str, list[Any]]) -> str:
    """Return the tensor that only moving `name`'s values makes of it, as far as it has no other use."""
    while True:
        reading = readers.get(name, [])
        if len(reading) == 1 and reading[0].op_type in LAYOUT and reading[0].input[0] == name:
            name = reading[0].output[0]
            continue
        # A roll: slices, and all of them joined again.
        joins = [node for piece in reading for node in readers.get(piece.output[0], [])]
        pieces = len(reading) > 1 and all(node.op_type == "Slice" for node in reading) and len(joins) == len(reading)
        if not pieces or joins[0].op_type != "Concat" or any(join is not joins[0] for join in joins):
            return name
        if len(joins[0].input) != len(reading):
            return name
        name = joins[0].output[0]


def check(proto: Any, model: Path) -> None:
    """Raise ModelError unless the graph is valid ONNX whose quantisation is symmetric int8."""
    import onnx

    # Types that NNCF noted of tensors which changed theirs since.
    del proto.graph.value_info[:]
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # the checker's, or the shape inference's
        raise ModelError(f"{model} quantised is no valid ONNX: {str(error).splitlines()[0]}") from error
    zeros = {n.input[2] for n in proto.graph.node if n.op_type == "QuantizeLinear" and len(n.input) > 2}
    for tensor in proto.graph.initializer:
        if tensor.name in zeros and (tensor.data_type != onnx.TensorProto.INT8 or onnx.numpy_helper.to_array(tensor).any()):
            raise ModelError(f"{model} quantised has an asymmetric scale ({tensor.name}), which TensorRT doesn't parse")


def calibration_frames(
    data: Path, shape: tuple[int, ...], count: int = FRAMES, topic: str | None = None
) -> Iterator[np.ndarray]:
    """Give up to `count` frames, evenly spread, of a folder of images (or its `images/`) or of a bag.

    :param shape: of the model's input, `(1, H, W, 3)`; frames are resized to it as `Segmenter` does.
    :param topic: the bag's image topic; None takes the one there is, or the likeliest.
    :return: uint8 `[1, H, W, 3]` BGR.
    :raises DataError, BagError, ImageError: when there are no images, or one cannot be read.
    """
    if count < 1:
        raise DataError(f"{count} frames to calibrate on make no sense; give --frames of 1 or more")
    pictures = _folder(data, count) if data.is_dir() and images_of(data) else _bag(data, count, topic)
    _, height, width, _ = shape
    for bgr in pictures:
        if bgr.shape[:2] != (height, width):
            shrinks = bgr.shape[0] * bgr.shape[1] > height * width
            bgr = cv2.resize(bgr, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        yield np.ascontiguousarray(bgr)[None]


def images_of(data: Path) -> list[Path]:
    folder = data / "images" if (data / "images").is_dir() else data
    return sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES), key=natural_order)


def spread(total: int, count: int) -> set[int]:
    """Return `count` of the indices 0..total-1, evenly spread; all of them where there are fewer."""
    return {i * total // count for i in range(count)} if total > count else set(range(total))


def _folder(data: Path, count: int) -> Iterator[np.ndarray]:
    files = images_of(data)
    for i in sorted(spread(len(files), count)):
        bgr = cv2.imread(str(files[i]), cv2.IMREAD_COLOR)
        if bgr is None:
            raise DataError(f"{files[i]}: not a readable image")
        yield bgr


def _bag(data: Path, count: int, topic: str | None) -> Iterator[np.ndarray]:
    if not data.exists():
        raise DataError(f"{data}: no such folder or bag to take calibration frames from")
    with open_bag(data) as bag:
        chosen = bag.image_topic(topic)
        wanted = spread(chosen.count, count)
        for i, message in enumerate(bag.messages([chosen.name])):
            if i in wanted:
                yield to_bgr(deserialize(message.raw, message.topic.msgtype))
