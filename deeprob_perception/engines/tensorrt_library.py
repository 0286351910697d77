# SPDX-License-Identifier: Apache-2.0
"""Which TensorRT is installed: `tensorrt` (10, 11) or `tensorrt_rtx` (TensorRT for RTX). The same API, told apart here.

They differ in three ways: TensorRT for RTX builds without a GPU, for any compute capability that it knows; its engines run on
every GPU of that capability; and it compiles the last step on the machine that runs them. TensorRT builds for the one GPU
that is in the machine.
"""

import logging
from collections import deque
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from deeprob_perception.errors import EngineError

MODULES = ("tensorrt", "tensorrt_rtx")
INSTALL = "`pip install tensorrt-rtx-cu13` gives TensorRT for RTX; on a Jetson, JetPack brings tensorrt"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """An imported TensorRT: its module, name (`tensorrt`, `tensorrt_rtx`) and version."""

    module: ModuleType
    name: str
    version: str

    @property
    def title(self) -> str:
        return f"{'TensorRT for RTX' if self.builds_anywhere else 'TensorRT'} {self.version}"

    @property
    def builds_anywhere(self) -> bool:
        """Tell whether it builds for GPUs that are not in this machine."""
        return self.name == "tensorrt_rtx"

    def targets(self) -> list[str]:
        """Return what it builds for without a GPU, as `sm_86`, oldest first; empty for plain TensorRT."""
        if not self.builds_anywhere:
            return []
        names = [name for name in dir(self.module.ComputeCapability) if name.startswith("SM") and name[2:].isdigit()]
        return [f"sm_{number}" for number in sorted(int(name[2:]) for name in names)]

    def logger(self) -> Any:
        return _logger(self.name)


def libraries() -> tuple[tuple[Library, ...], str]:
    """Return what is installed, plain TensorRT first, and why the others cannot be imported."""
    found, missing = [], []
    for name in MODULES:
        try:
            module = import_module(name)
            # A stub wheel imports and holds nothing.
            found.append(Library(module, name, module.__version__))
            module.OnnxParser  # noqa: B018
        except Exception as error:  # a broken wheel raises anything
            missing.append(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
            found = [library for library in found if library.name != name]
    return tuple(found), "; ".join(missing)


def library(sm: str | None = None, anywhere: bool = False) -> Library:
    """Return the TensorRT to use.

    :param sm: of the GPU that is here; TensorRT for RTX is passed over where it doesn't know it.
    :param anywhere: for a build that needs no GPU.
    :raises EngineError: when none fits.
    """
    found, missing = libraries()
    if not found:
        raise EngineError(f"TensorRT is not installed ({missing}); {INSTALL}")
    fitting = [lib for lib in found if lib.builds_anywhere or not anywhere]
    if not fitting:
        raise EngineError(
            f"{found[0].title} builds only for the GPU in the machine; for another one build on that machine, or install "
            "TensorRT for RTX (`pip install tensorrt-rtx-cu13`)"
        )
    if sm is not None:
        knowing = [lib for lib in fitting if not lib.builds_anywhere or sm in lib.targets()]
        if not knowing:
            known = ", ".join(fitting[0].targets())
            raise EngineError(f"{fitting[0].title} builds for {known}, not for {sm}")
        fitting = knowing
    return fitting[0]


@cache
def _logger(name: str) -> Any:
    """Return the process's one logger of a library, which TensorRT wants shared by builders, parsers and runtimes."""
    trt = import_module(name)

    class Logger(trt.ILogger):  # type: ignore[name-defined,misc]
        """Keeps the last errors for the exception that tells of them, and passes the rest on, quietly."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=20)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            if severity <= trt.ILogger.INFO:
                log.debug("%s: %s", name, message)

        def last_error(self) -> str:
            """Return the latest error's first line, and forget all."""
            text = self.errors[-1].strip().splitlines()[0] if self.errors else "no reason given"
            self.errors.clear()
            return text

    return Logger()
