# SPDX-License-Identifier: Apache-2.0
"""The simulated table top: random scenes, their rendering, exact ground truth. Needs the extra `sim` (MuJoCo).

Importing any part of it raises SimulationError, with what to install, where MuJoCo or OpenGL is missing.
"""

import logging
import os

from deeprob_perception.errors import PerceptionError

EGL_ADVICE = "on Debian or Ubuntu: apt install libegl1 libgl1-mesa-dri"


class SimulationError(PerceptionError):
    """The simulator or its OpenGL libraries are missing or unfit."""


os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo reads it when imported; EGL renders without a display
try:
    import mujoco
except ModuleNotFoundError as error:
    raise SimulationError(
        f"the simulator needs the Python package {error.name}; pip install 'deeprob_perception[sim]'") from error
except (ImportError, AttributeError, OSError) as error:  # PyOpenGL without libEGL fails with any of these
    raise SimulationError(
        f"cannot load OpenGL for off-screen rendering (MUJOCO_GL={os.environ['MUJOCO_GL']}: {error}); {EGL_ADVICE}"
    ) from error


# An arm that runs through an object can throw it out of the room; MuJoCo then begins that scene anew, and would leave a file
# MUJOCO_LOG.TXT wherever somebody renders.
mujoco.set_mju_user_warning(lambda text: logging.getLogger(__name__).info("MuJoCo: %s", text))
