# SPDX-License-Identifier: Apache-2.0
"""A model file in fp32 -> the same graph in fp16 or bf16, since TensorRT's strongly typed networks read precision from it.

What runs in half precision are the matrix products and convolutions, the pointwise work between them, and what only moves
values. Kept in fp32, and why:

- the residual stream, the sums `x + branch(x)` that a LayerNorm reads: it grows from block to block; Swin and ViT
  checkpoints are known to leave fp16's range (65504) there, and each sum would round away what small branches add;
- LayerNorm: it sums squares, which overflow fp16 from inputs of 256 on;
- soft-max and every exp, sum and mean: thousands of terms in 11 bits lose the small ones, and a mean's sum may overflow;
- the image's normalisation, whose input is 8-bit and whose result is rounded once, on its way into the first convolution.

Input and outputs stay uint8, the metadata stays and gains `deeprob.precision`. Weights are stored in the half type; a tensor
that fp16 cannot hold keeps its operator in fp32.
"""

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto

from deeprob_perception.engines.model_file import PREFIX
from deeprob_perception.errors import EngineError

VERSION = 1  # of what this file does: a part of the cache's key, so that engines of older rules are not taken
HALF_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FLOAT16_MAX = 65504.0
# Convolutions and pools take bfloat16 from opset 22 on; fp16 stays at the file's own, which every TensorRT 10 parses.
BF16_OPSET = 22

HALF = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"}
# They compute in what they are given. The first set also copies values exactly.
MOVING = {
    "Transpose", "Reshape", "Slice", "Concat", "Pad", "Split", "Squeeze", "Unsqueeze", "Gather", "GatherND", "GatherElements",
    "Identity", "Expand", "Tile", "Flatten", "DepthToSpace", "SpaceToDepth", "Relu", "MaxPool", "ReduceMax", "Max", "Min",
    "ArgMax", "Clip", "Neg", "Where",
}  # fmt: skip
FOLLOWING = MOVING | {"Add", "Sub", "Mul", "Div", "Erf", "Gelu", "Tanh", "Sigmoid", "HardSwish", "Resize", "BatchNormalization",
                      "Round"}  # fmt: skip
# Their result is of order one: whoever reads it may have it in half, so that windows are cut and moved at half the bytes.
NARROWED = {"LayerNormalization", "Softmax"}
# Inputs that hold values, where not all float inputs do: Resize's scales, BatchNormalization's statistics stay fp32.
VALUES = {"Resize": (0,), "BatchNormalization": (0,)}

FULL, LOW = "fp32", "half"


def lower(proto: ModelProto, precision: str, emulate: bool = False) -> ModelProto:
    """Return an fp32 model in another precision.

    :param precision: `fp32` (the model as it is), `fp16` or `bf16`.
    :param emulate: give a graph that computes in fp32 and rounds to the half type wherever the lowered one does. CPUs have
        few half kernels: ONNX Runtime runs a half graph in fp32 and leaves out the rounding between operators, so that
        overflow does not show; in this graph it does.
    :raises EngineError: for another precision, or a model that is not fp32.
    """
    stored = precision_of(proto)
    if precision == "fp32" and stored == "fp32":
        return proto
    if precision not in HALF_TYPES or stored != "fp32":
        raise EngineError(f"cannot make {precision} of a model file in {stored}; give the fp32 file")
    if precision == "bf16" and not emulate:
        proto = onnx.version_converter.convert_version(proto, BF16_OPSET)
    lowered = _Lowering(proto, HALF_TYPES[precision], emulate).run()
    lowered.metadata_props.add(key=f"{PREFIX}precision", value=precision)
    return lowered


def precision_of(proto: ModelProto) -> str:
    """Return what a model file says that it computes in; a file that says nothing is fp32."""
    return next((p.value for p in proto.metadata_props if p.key == f"{PREFIX}precision"), "fp32")


class _Lowering:
    """One pass over the graph, from inputs to outputs, that gives every float value a type and casts where they meet."""

    def __init__(self, proto: ModelProto, half: int, emulate: bool):
        self.proto = ModelProto()
        self.proto.CopyFrom(proto)
        self.half = half
        self.emulate = emulate
        graph = self.proto.graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.producer = {name: node for node in graph.node for name in node.output}
        self.constant = constants(graph.node, self.weights)
        self.sums, self.stream_norms = residual_stream(graph.node, self.producer, self.constant)
        self.type: dict[str, str] = {}  # a float value -> what it is computed in; other values are absent
        self.preferred: dict[str, str] = {}  # -> what those that compute in what they are given should take it in
        self.alias: dict[str, str] = {}  # a weight behind its Cast -> the weight
        self.cast: dict[tuple[str, str], str] = {}
        self.nodes: list[NodeProto] = []
        self.new_weights: list[TensorProto] = []

    def run(self) -> ModelProto:
        for name, tensor in self.weights.items():
            if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
                # As stored: fp16 weights are half's already, fp32 ones become so if an operator in half reads them.
                self.type[name] = LOW if tensor.data_type == TensorProto.FLOAT16 else FULL
                self.preferred[name] = LOW
        for node in self.proto.graph.node:
            self.convert(node)
        graph = self.proto.graph
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.new_weights)
        read = {name for node in graph.node for name in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        return self.proto

    def convert(self, node: NodeProto) -> None:
        new = NodeProto()
        new.CopyFrom(node)
        if node.op_type == "Cast":
            if self.convert_cast(node, new):
                self.nodes.append(new)
            return
        kind = self.kind(node)
        values = VALUES.get(node.op_type, range(len(node.input)))
        floats = False
        for i, name in enumerate(node.input):
            name = self.alias.get(name, name)
            if name in self.type:
                new.input[i] = self.taken(name, kind if i in values else FULL)
                floats = floats or i in values
        self.nodes.append(new)
        if not floats or node.op_type in ("ArgMax", "Shape", "Equal", "Less", "Greater"):
            return
        for i, name in enumerate(node.output):
            if kind == LOW and self.emulate and node.op_type not in MOVING:
                new.output[i] = f"{name}/unrounded"
                self.round(new.output[i], name)
            self.type[name] = kind
            narrow = node.op_type in NARROWED and name not in self.stream_norms
            self.preferred[name] = LOW if narrow or (name in self.constant and kind == LOW) else kind

    def kind(self, node: NodeProto) -> str:
        """Return what an operator computes in."""
        values = [self.alias.get(node.input[i], node.input[i]) for i in VALUES.get(node.op_type, range(len(node.input)))]
        if any(name in self.weights and not self.fits(self.weights[name]) for name in values):
            return FULL
        if node.op_type in HALF:
            return LOW
        if node.op_type not in FOLLOWING or (node.op_type == "Add" and node.output[0] in self.sums):
            return FULL
        computed = [name for name in values if name in self.type and name not in self.constant]
        known = computed or [name for name in values if name in self.type]
        return FULL if any(self.preferred[name] == FULL for name in known) else LOW

    def convert_cast(self, node: NodeProto, new: NodeProto) -> bool:
        """Give a Cast's output its type; return whether the node is still needed."""
        (source,), (output,) = node.input, node.output
        source = self.alias.get(source, source)
        to = next(a.i for a in node.attribute if a.name == "to")
        if to != TensorProto.FLOAT:
            new.input[0] = source
            return True
        if source in self.type:  # a weight that is stored in half, or nothing at all
            self.alias[output] = source
            return False
        # From integers: the image is normalised in fp32; a mask of constants is exact in half.
        kind = LOW if source in self.constant else FULL
        self.type[output] = self.preferred[output] = kind
        if kind == LOW and not self.emulate:
            del new.attribute[:]
            new.attribute.append(onnx.helper.make_attribute("to", self.half))
        return True

    def taken(self, name: str, kind: str) -> str:
        """Return the name under which a value is to be read as `kind`, with a Cast or a converted weight if need be."""
        if name in self.weights:
            return self.weight(self.weights[name], kind)
        if self.type[name] == kind:
            return name
        if (name, kind) not in self.cast:
            self.cast[name, kind] = f"{name}/{kind}"
            if not self.emulate:
                to = self.half if kind == LOW else TensorProto.FLOAT
                self.nodes.append(onnx.helper.make_node("Cast", [name], [f"{name}/{kind}"], to=to))
            elif kind == LOW:
                self.round(name, f"{name}/{kind}")
            else:
                self.cast[name, kind] = name  # what was rounded is an fp32 value
        return self.cast[name, kind]

    def weight(self, tensor: TensorProto, kind: str) -> str:
        if (tensor.name, kind) not in self.cast:
            # In emulation everything is held in fp32, what stands for half with the half type's values.
            held = TensorProto.FLOAT if kind == FULL or self.emulate else self.half
            rounding = TensorProto.FLOAT if kind == FULL else self.half
            if tensor.data_type == held and rounding in (held, tensor.data_type):
                self.cast[tensor.name, kind] = tensor.name
            else:
                name = f"{tensor.name}/{kind}"
                array = rounded(onnx.numpy_helper.to_array(tensor).astype(np.float32), rounding)
                self.new_weights.append(stored(array, name, held))
                self.cast[tensor.name, kind] = name
        return self.cast[tensor.name, kind]

    def round(self, name: str, result: str) -> None:
        self.nodes.append(onnx.helper.make_node("Cast", [name], [f"{result}/narrow"], to=self.half))
        self.nodes.append(onnx.helper.make_node("Cast", [f"{result}/narrow"], [result], to=TensorProto.FLOAT))

    def fits(self, tensor: TensorProto) -> bool:
        if self.half != TensorProto.FLOAT16 or tensor.data_type != TensorProto.FLOAT:
            return True
        return bool(np.abs(onnx.numpy_helper.to_array(tensor)).max(initial=0) < FLOAT16_MAX)


def constants(nodes: Iterable[NodeProto], weights: Iterable[str]) -> set[str]:
    """Return the values that depend on no input of the graph."""
    found = set(weights)
    for node in nodes:
        if all(name in found or not name for name in node.input):
            found.update(node.output)
    return found


def residual_stream(
    nodes: Iterable[NodeProto], producer: dict[str, NodeProto], constant: set[str]
) -> tuple[set[str], set[str]]:
    """Return the sums of two computed values that lead into a LayerNorm, and the norms whose result such a sum reads."""
    sums: set[str] = set()
    norms: set[str] = set()
    seen: set[str] = set()
    pending = [node.input[0] for node in nodes if node.op_type == "LayerNormalization"]
    while pending:
        name = pending.pop()
        node = producer.get(name)
        if node is None or name in seen or name in constant:
            continue
        seen.add(name)
        if node.op_type in MOVING:
            pending.extend(node.input)
        elif node.op_type == "Add" and not constant.intersection(node.input):
            sums.add(name)
            pending.extend(node.input)
            norms.update(i for i in node.input if i in producer and producer[i].op_type == "LayerNormalization")
    return sums, norms


def rounded(array: np.ndarray, to: int) -> np.ndarray:
    """Return float32 values rounded to the nearest of another type, still as float32."""
    if to == TensorProto.FLOAT16:
        with np.errstate(over="ignore"):
            return array.astype(np.float16).astype(np.float32)
    if to == TensorProto.BFLOAT16:
        return (bfloat16_bits(array).astype(np.uint32) << 16).view(np.float32)
    return array


def stored(array: np.ndarray, name: str, held: int) -> TensorProto:
    if held == TensorProto.BFLOAT16:
        tensor = TensorProto(name=name, data_type=held, dims=array.shape)
        tensor.raw_data = bfloat16_bits(array).tobytes()
        return tensor
    return onnx.numpy_helper.from_array(array.astype(np.float16 if held == TensorProto.FLOAT16 else np.float32), name)


def bfloat16_bits(array: np.ndarray) -> np.ndarray:
    """Return the upper halves of float32 values, rounded to nearest even: uint16, of the same shape."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
