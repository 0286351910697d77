# SPDX-License-Identifier: Apache-2.0
"""What every back end offers: a model that is called with arrays by name and returns arrays by name."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deeprob_perception.engines.model_file import ModelFile, TensorSpec
from deeprob_perception.errors import EngineError


class Engine(ABC):
    """A loaded model.

    `engine(image=array, outputs=("labels",))` returns fresh arrays that are safe to keep; outputs that are not asked for
    are not computed. One call at a time: an engine belongs to one worker thread, and a second worker loads its own.

    - `inputs`, `outputs`: lists of TensorSpec (name, shape, dtype)
    - `backend`, `device`: names, such as `openvino` and `AMD EPYC`
    - `precision`: what the arithmetic really runs in (`fp32`, `bf16`, `fp16`, or `int8`: the matrix products and convolutions
      of a quantised file, with a float rest), `requested_precision`: what was asked for
    - `metadata`: the model's own, keys without prefix
    """

    backend: str
    device: str
    precision: str

    def __init__(self, model: ModelFile, requested_precision: str):
        self.path: Path = model.path
        self.inputs: list[TensorSpec] = model.inputs
        self.outputs: list[TensorSpec] = model.outputs
        self.metadata: dict[str, str] = model.metadata
        self.requested_precision = requested_precision

    def __call__(self, *, outputs: Sequence[str] | None = None, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run the model once.

        :param outputs: names of what to compute; None for all.
        :param inputs: one array for each of `self.inputs`, of its shape and dtype; a contiguous one is not copied.
        :raises EngineError: for an unknown name, a missing input, a wrong shape or dtype, or a back end that fails.
        """
        known = [s.name for s in self.outputs]
        wanted = known if outputs is None else outputs
        for name in wanted:
            if name not in known:
                raise EngineError(f"the model {self.path.name} has no output {name!r}; it has: {', '.join(known)}")
        checked = {s.name: check_input(s, inputs.pop(s.name, None)) for s in self.inputs}
        if inputs:
            raise EngineError(f"the model {self.path.name} has no input {next(iter(inputs))!r}; it has: {', '.join(checked)}")
        return self.run(checked, [name for name in known if name in wanted])

    @abstractmethod
    def run(self, inputs: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        """Compute `outputs` (names of the model, in its order) of checked, contiguous inputs."""

    def __repr__(self) -> str:
        return f"<{self.backend} {self.precision} engine of {self.path.name} on {self.device}>"


def check_input(spec: TensorSpec, array: np.ndarray | None) -> np.ndarray:
    """Return the array, C-contiguous; raise EngineError when it is missing or not what `spec` says."""
    if array is None:
        raise EngineError(f"the input {spec.name!r} is missing; give {spec}")
    if not isinstance(array, np.ndarray) or array.dtype != spec.dtype or array.shape != spec.shape:
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise EngineError(f"the input {spec.name!r} is {got}; the model takes {spec.dtype} {list(spec.shape)}")
    return np.ascontiguousarray(array)


def settle_precision(model: ModelFile, asked: str, backend: str, floats: Sequence[str], quantised: bool = True) -> str:
    """Return the precision that a back end shall run a file in: int8 for a quantised file, else one of `floats`.

    :param asked: a name in `engines.PRECISIONS`; `auto` takes the first that fits.
    :param floats: what the back end can run a fp32 file in, the one that `auto` takes first.
    :param quantised: whether it runs int8 files.
    :raises EngineError: when the file, the back end and what was asked for do not go together, saying what would.
    """
    name = model.path.name
    if model.precision != "fp32" and not (model.precision == "int8" and quantised):
        raise EngineError(f"{name} is a model file in {model.precision}; {backend} takes the fp32 file that it was made from")
    offered = ["int8"] if model.precision == "int8" else list(floats)
    if asked == "auto":
        return offered[0]
    if asked in offered:
        return asked
    if asked == "int8" and quantised:
        raise EngineError(f"{name} is a model file in fp32; `deeprob quantize {name} --data DATA --out OUT` makes an int8 one")
    if asked not in floats:
        known = ", ".join([*floats, *(["int8"] if quantised else [])])
        raise EngineError(f"the back end {backend} computes in {known}, not in {asked}; take one of these")
    raise EngineError(f"{name} is a model file in int8 and cannot run in {asked}; take the fp32 file that it was made from")
