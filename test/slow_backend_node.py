# SPDX-License-Identifier: Apache-2.0
"""The segmentation node with one more back end, `slow`, whose engine is "built" as soon as a file says how the build ends.

Run by test_engine_source.py: slow_backend_node.py FILE --ros-args ... ONNX Runtime does the work; only the build is made up.
"""

import sys
import types
from pathlib import Path

verdict = Path(sys.argv.pop(1))

from deeprob_perception import engines  # noqa: E402
from deeprob_perception.engines import onnxruntime  # noqa: E402
from deeprob_perception.errors import EngineError  # noqa: E402

# The build is a process, as `deeprob build` is: it waits for the verdict, then ends well or not.
BUILD = """
import sys, time
from pathlib import Path
while not Path(sys.argv[1]).exists():
    time.sleep(0.02)
print("built by a process of its own", flush=True)
sys.exit(Path(sys.argv[1]).read_text() != "good")
"""


class SlowEngine(onnxruntime.OnnxRuntimeEngine):
    backend = "slow"


def ready(model, precision, cache_dir):
    return verdict.exists() and verdict.read_text() == "good"


def load(model, precision, cache_dir, threads):
    if not ready(model, precision, cache_dir):
        raise EngineError("the slow engine is not built")
    return SlowEngine(model, precision, cache_dir, threads) if TAKES_CACHE else SlowEngine(model, precision, threads)


TAKES_CACHE = "cache_dir" in onnxruntime.OnnxRuntimeEngine.__init__.__code__.co_varnames
slow = types.ModuleType("deeprob_perception.engines.slow")
slow.unavailable, slow.ready, slow.load = lambda: None, ready, load
sys.modules[slow.__name__] = slow
engines.BACKENDS = ("slow", *engines.BACKENDS)

from deeprob_perception.nodes import engine_source  # noqa: E402

engine_source.build_command = lambda wish: [sys.executable, "-c", BUILD, str(verdict)]

from deeprob_perception.nodes.segmentation import main  # noqa: E402

main()
