# SPDX-License-Identifier: Apache-2.0
"""The model file's contract: what an `.onnx` of ours says about itself, checked before a back end sees it."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from deeprob_perception.errors import ModelError

CONTRACT = "1"
PREFIX = "deeprob."
# task -> metadata that it cannot do without
REQUIRED = {
    "segmentation": ("name", "classes", "palette"),
    "features": ("name", "patch_size"),
    "reach": ("name", "layout"),
    "leap_rotation": ("name", "layout"),
}
# a policy's task -> its action and its self-model's answer, which it may lack
POLICY_OUTPUTS = {"reach": ("action", "forward_kinematics"), "leap_rotation": ("policy", "policy_forward_kinematics")}


@dataclass(frozen=True)
class TensorSpec:
    """A named input or output of fixed shape."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class ModelFile:
    """A checked model: where it lies, its inputs and outputs, and its metadata without the prefix."""

    path: Path
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    metadata: dict[str, str]

    @property
    def precision(self) -> str:
        """What the file's arithmetic is in: `fp32`, unless it was quantised or lowered."""
        return self.metadata.get("precision", "fp32")

    @cached_property
    def sha256(self) -> str:
        """The file's checksum, in hexadecimal: what anything that is made from it is kept under."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def read(path: str | Path) -> ModelFile:
    """Read and check a model file.

    :raises ModelError: when it is missing, empty, damaged, no ONNX, not exported by `deeprob export`, of another
        contract version, or does not have the inputs and outputs of its task.
    """
    path = Path(path)
    proto = parse(path)
    metadata = {p.key.removeprefix(PREFIX): p.value for p in proto.metadata_props if p.key.startswith(PREFIX)}
    if "contract" not in metadata:
        raise ModelError(
            f"{path} is an ONNX file, but not one of ours (it has no {PREFIX}contract); make one by `deeprob export`"
        )
    if metadata["contract"] != CONTRACT:
        raise ModelError(
            f"{path} follows contract {metadata['contract']!r}, but this version reads {CONTRACT!r}; export it again"
        )
    weights = {tensor.name for tensor in proto.graph.initializer}
    try:
        inputs = [spec(value) for value in proto.graph.input if value.name not in weights]
        outputs = [spec(value) for value in proto.graph.output]
    except ValueError as error:
        raise ModelError(f"{path}: {error}; export it again") from error
    model = ModelFile(path, inputs, outputs, metadata)
    task = metadata.get("task")
    if task not in REQUIRED:
        raise ModelError(f"{path} is for the task {task!r}; this version knows: {', '.join(REQUIRED)}")
    for key in REQUIRED[task]:
        if key not in metadata:
            raise ModelError(f"{path} lacks the metadata {PREFIX}{key}; export it again")
    CHECKS[task](model)
    return model


def image_shape(model: ModelFile) -> tuple[int, int, int, int]:
    """Return the shape `[1, H, W, 3]` of a model's image.

    :raises ModelError: for a model that takes none, such as a policy.
    """
    if [spec.name for spec in model.inputs] != ["image"]:
        task = model.metadata["task"]
        raise ModelError(f"{model.path} is for the task {task!r} and takes no image; this is for models that do")
    one, height, width, channels = model.inputs[0].shape
    return one, height, width, channels


def parse(path: Path) -> Any:
    """Return the file's `onnx.ModelProto`; raise ModelError naming what is wrong with the file."""
    import onnx
    from google.protobuf.message import DecodeError

    if path.is_dir():
        raise ModelError(f"{path} is a folder; give the .onnx file in it")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"there is no model file {path}; `deeprob models list` shows what there is") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    if not content:
        raise ModelError(f"{path} is empty; copy or export it again")
    try:
        proto = onnx.load_model_from_string(content)
    except DecodeError:
        raise ModelError(f"{path} is damaged or no ONNX file ({len(content)} bytes); copy or export it again") from None
    if not proto.graph.node or not proto.graph.output:
        raise ModelError(f"{path} is damaged or no ONNX file (it holds no graph); copy or export it again")
    return proto


def spec(value: Any) -> TensorSpec:
    """Return an `onnx.ValueInfoProto` as a TensorSpec; raise ValueError unless it is a tensor of fixed shape."""
    import onnx

    tensor = value.type.tensor_type
    if not tensor.elem_type:
        raise ValueError(f"{value.name} is not a tensor")
    shape = tuple(d.dim_value for d in tensor.shape.dim)
    if not all(n > 0 for n in shape):
        raise ValueError(f"{value.name} has no fixed shape")
    return TensorSpec(value.name, shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))


def breach(model: ModelFile, what: str) -> ModelError:
    """Return the error that says what of its task's contract a file breaks."""
    return ModelError(f"{model.path} breaks the contract for {model.metadata['task']} models: {what}; export it again")


def check_image(model: ModelFile) -> tuple[int, ...]:
    """Return the shape `[1, H, W, 3]` of the only input; raise ModelError unless it is an 8-bit image."""
    inputs = {s.name: s for s in model.inputs}
    if list(inputs) != ["image"]:
        raise breach(model, f"its inputs are {list(inputs)}, not ['image']")
    shape = inputs["image"].shape
    if inputs["image"].dtype != np.uint8 or len(shape) != 4 or shape[0] != 1 or shape[3] != 3:
        raise breach(model, f"its input is {inputs['image']}, not uint8 [1, H, W, 3]")
    return shape


def check_segmentation(model: ModelFile) -> None:
    """Raise ModelError unless image, labels, confidence, classes and palette are what design contract 1 says."""

    wrong = partial(breach, model)
    shape = check_image(model)
    outputs = {s.name: s for s in model.outputs}
    for name in ("labels", "confidence"):
        if name not in outputs:
            raise wrong(f"it has no output {name!r}")
        if outputs[name].dtype != np.uint8 or outputs[name].shape != shape[:3]:
            raise wrong(f"its output is {outputs[name]}, not uint8 {list(shape[:3])}")
    try:
        classes = json.loads(model.metadata["classes"])
        palette = np.array(json.loads(model.metadata["palette"]))
    except ValueError as error:
        raise wrong(f"classes or palette are no JSON ({error})") from error
    if not (isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)):
        raise wrong("classes is no list of names")
    if palette.shape != (len(classes), 3) or palette.dtype.kind != "i" or palette.min() < 0 or palette.max() > 255:
        raise wrong(f"palette is not {len(classes)} colours [r, g, b] of 0..255")


def check_features(model: ModelFile) -> None:
    """Raise ModelError unless the features are float32 `[1, H / patch, W / patch, C]` and their only output."""
    _, height, width, _ = check_image(model)
    outputs = {s.name: s for s in model.outputs}
    if list(outputs) != ["features"]:
        raise breach(model, f"its outputs are {list(outputs)}, not ['features']")
    patch = model.metadata["patch_size"]
    if not patch.isascii() or not patch.isdigit() or not int(patch):
        raise breach(model, f"its patch_size is {patch!r}, not a number of pixels")
    found, side = outputs["features"], int(patch)
    if found.dtype != np.float32 or len(found.shape) != 4 or found.shape[:3] != (1, height // side, width // side):
        raise breach(model, f"its output is {found}, not float32 [1, {height // side}, {width // side}, C]")


def check_policy(model: ModelFile) -> None:
    """Raise ModelError unless tokens and graph come in and an action for each of N joints goes out.

    Inputs: `tokens` float32 `[1, N, F]`; `distance`, `parent`, `child` int `[1, N, N]` and `padding` bool `[1, N]`, of which a
    network that does not look at the graph may lack some. Outputs: the action float32 `[1, N]` or `[1, N, 1]`, and `[1, N, 3]`.
    """
    wrong = partial(breach, model)
    inputs, outputs = ({s.name: s for s in specs} for specs in (model.inputs, model.outputs))
    if "tokens" not in inputs or inputs["tokens"].dtype != np.float32 or len(inputs["tokens"].shape) != 3:
        raise wrong(f"its input tokens is {inputs.get('tokens', 'missing')}, not float32 [1, N, F]")
    count = inputs["tokens"].shape[1]
    shapes = {"tokens": (1, *inputs["tokens"].shape[1:]), "padding": (1, count)}
    for name, spec in inputs.items():
        if name not in (*shapes, "distance", "parent", "child"):
            raise wrong(f"it has an input {name!r}")
        shape = shapes.get(name, (1, count, count))
        if spec.shape != shape or spec.dtype.kind != {"tokens": "f", "padding": "b"}.get(name, "i"):
            raise wrong(f"its input is {spec}, which does not fit {count} joints")
    action, places = POLICY_OUTPUTS[model.metadata["task"]]
    if action not in outputs or outputs[action].shape not in ((1, count), (1, count, 1)):
        raise wrong(f"its output {action} is {outputs.get(action, 'missing')}, not [1, {count}]")
    if places in outputs and outputs[places].shape != (1, count, 3):
        raise wrong(f"its output is {outputs[places]}, not [1, {count}, 3]")


CHECKS = {
    "segmentation": check_segmentation,
    "features": check_features,
    "reach": check_policy,
    "leap_rotation": check_policy,
}
