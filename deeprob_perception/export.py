# SPDX-License-Identifier: Apache-2.0
"""Network -> one self-describing `.onnx`: 8-bit image in, 8-bit labels or features out, everything between in the graph.

Weights are stored as float16 with a Cast to float32 behind each (half the file; back ends fold the casts while they
load), under the names of the torch parameters and unfused, so that `zoo` can read them back for fine-tuning. Folding batch
normalisation into convolutions, or the transposes of matrices into the matrices, is the back ends' work.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

from deeprob_perception.engines.model_file import CONTRACT, PREFIX
from deeprob_perception.errors import ModelError
from deeprob_perception.files import write_whole
from deeprob_perception.nets.features import FeatureNet
from deeprob_perception.nets.image_graph import FeatureGraph, ImageGraph, SegmentationGraph

# LayerNormalization came with 17, TensorRT 10 parses up to 22; 18 is the oldest that the dynamo exporter writes itself.
OPSET = 18
FLOAT16_MAX = 65504.0
FOLD_LIMIT = 1 << 14  # elements


def export_segmentation(
    net: nn.Module, recipe: dict[str, Any], path: Path, height: int, width: int, extra_metadata: dict[str, str]
) -> Path:
    """Write a segmentation network as an ONNX file that every engine reads.

    :param net: `nets.segmenter.SegmentationNet` with its weights loaded.
    :param recipe: what `net` was built from; its classes, palette, mean and std go into the file.
    :param height: of the fixed input, pixels. :param width: likewise.
    :param extra_metadata: `name`, `licence`, `training_data`, `metrics` (JSON); absent ones are written as unknown.
    :returns: `path`. The file appears whole or not at all.
    :raises ModelError: for a recipe or size that the contract cannot hold, or a folder that cannot be written.
    """
    path = Path(path)
    classes, palette = list(recipe["classes"]), [list(map(int, colour)) for colour in recipe["palette"]]
    if not 1 <= len(classes) <= 255:
        raise ModelError(f"cannot export {len(classes)} classes: labels are 8-bit and 255 means void, so 1 to 255 fit")
    if len(palette) != len(classes):
        raise ModelError(f"the recipe has {len(classes)} classes but {len(palette)} palette colours; give one for each")
    if height < 32 or width < 32:
        raise ModelError(f"cannot export {height}x{width}: the backbone's stride is 32, so that is the least for each side")
    about = {"task": "segmentation", "classes": json.dumps(classes), "palette": json.dumps(palette), **extra_metadata}
    return write_model(SegmentationGraph(net, recipe), ["labels", "confidence"], recipe, path, height, width, about)


def export_features(
    net: FeatureNet, recipe: dict[str, Any], path: Path, height: int, width: int, extra_metadata: dict[str, str]
) -> Path:
    """Write a ViT as an ONNX file that every engine reads; parameters as those of `export_segmentation`.

    The positions are interpolated to the size here, exactly as torch does it, in `net` too.
    :raises ModelError: for a size that is no multiple of the patch's, or a folder that cannot be written.
    """
    patch = net.backbone.patch_size
    if height % patch or width % patch or height < patch or width < patch:
        near = f"{max(1, round(height / patch)) * patch}x{max(1, round(width / patch)) * patch}"
        raise ModelError(f"cannot export {height}x{width}: {recipe['backbone']} cuts patches of {patch} pixels; take {near}")
    net.backbone.fix_size(height, width)
    if net.backbone.pos_embed is not None:
        recipe = {**recipe, "image_size": [height, width]}  # what the positions in the file are for now
    about = {"task": "features", "patch_size": str(patch), **extra_metadata}
    return write_model(FeatureGraph(net, recipe), ["features"], recipe, Path(path), height, width, about)


def write_model(
    graph: ImageGraph, outputs: list[str], recipe: dict[str, Any], path: Path, height: int, width: int, about: dict[str, str]
) -> Path:
    """Trace a graph, store its weights under torch's names, and write both with the metadata."""
    state = graph.net.state_dict()
    model = trace(graph.cpu().eval(), {"image": torch.zeros(1, height, width, 3, dtype=torch.uint8)}, outputs)
    fold_shapes(model, {f"net.{name}" for name in state})
    proto = ir.to_proto(model)
    store_weights(proto, state, prefix="net.")
    unknown = {"name": path.stem, "licence": "unknown", "training_data": "unknown", "metrics": "{}"}
    metadata = {"contract": CONTRACT, **unknown, "recipe": json.dumps(recipe), **about}
    for key, value in metadata.items():
        proto.metadata_props.add(key=PREFIX + key, value=value)
    onnx.checker.check_model(proto, full_check=True)
    write(path, proto.SerializeToString())
    return path


def trace(module: nn.Module, examples: dict[str, Tensor], outputs: list[str]) -> ir.Model:
    """Return the unoptimised graph of `module` with the examples' names for inputs; parameter names are torch's."""
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            module,
            tuple(examples.values()),
            dynamo=True,
            optimize=False,  # its passes transpose, merge and rename the weights
            opset_version=OPSET,
            input_names=list(examples),
            output_names=outputs,
            verbose=False,
        )
    assert program is not None  # None is the TorchScript exporter's answer
    return program.model


def fold_shapes(model: ir.Model, weights: set[str]) -> None:
    """Fold what depends on shapes alone and drop dead nodes; nodes that read a weight stay as they are."""

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    passes.InlinePass()(model)
    # Folding makes nodes dead, and their going makes others foldable. The limit leaves the attention masks, megabytes that
    # follow from a few numbers, to be computed while loading.
    for _ in range(3):
        fold_constants(
            model,
            onnx_shape_inference=True,
            input_size_limit=FOLD_LIMIT,
            output_size_limit=FOLD_LIMIT,
            should_fold=should_fold,
        )
        passes.RemoveUnusedNodesPass()(model)
    ir.passes.Sequential(
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.IdentityEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)


def round_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state as the exported file holds it: matrices and kernels rounded to float16, the rest unchanged.

    Vectors (biases, norms) stay float32: they are small, and a running variance may exceed float16's range.
    """
    return {name: value.half().to(value.dtype) if in_half(value) else value for name, value in state.items()}


def in_half(value: Tensor) -> bool:
    return value.dtype == torch.float32 and value.ndim >= 2 and bool(value.abs().max() < FLOAT16_MAX)


def store_weights(proto: onnx.ModelProto, state: dict[str, Tensor], prefix: str) -> None:
    """Give the initialisers torch's parameter names (less `prefix`) and store the large ones as float16 + Cast."""
    graph = proto.graph
    casts = []
    renamed: dict[str, str] = {}  # what the graph reads -> what it shall read
    for tensor in graph.initializer:
        name = tensor.name.removeprefix(prefix)
        if name == tensor.name or name not in state:
            continue
        if in_half(state[name]):
            renamed[tensor.name] = f"{name}/float32"
            array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
            casts.append(onnx.helper.make_node("Cast", [name], [f"{name}/float32"], to=onnx.TensorProto.FLOAT))
        else:
            renamed[tensor.name] = tensor.name = name
    for node in graph.node:
        for i, read in enumerate(node.input):
            node.input[i] = renamed.get(read, read)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    for i in reversed(range(len(graph.value_info))):
        if graph.value_info[i].name in renamed:
            del graph.value_info[i]


def write(path: Path, content: bytes) -> None:
    """Write a model, whole or not at all."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror}; choose another --out") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's notes on packages that it does without (torchvision) and on its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
