# SPDX-License-Identifier: Apache-2.0
"""A robot's graph as a policy model takes it: matrices padded to the model's number of joints, and where the padding is."""

import numpy as np

from deeprob_perception.engines import Engine
from deeprob_perception.errors import RobotError
from deeprob_perception.robots import Graph

LONGEST = 15  # path and chain that the published tables hold


def slots(engine: Engine) -> int:
    """Return how many joints a model takes."""
    return next(spec.shape[1] for spec in engine.inputs if spec.name == "tokens")


def graph_inputs(engine: Engine, graph: Graph, robot: str) -> dict[str, np.ndarray]:
    """Return `distance`, `parent`, `child` int `[1, N, N]` and `padding` bool `[1, N]`: those of them that the model takes.

    :raises RobotError: for a robot of more joints than the model takes, or with a path longer than its tables.
    """
    count, size = len(graph.distance), slots(engine)
    if count > size:
        raise RobotError(f"{robot!r} has {count} joints to move, the model takes {size}; name fewer of them by `joints`")
    longest = int(max(graph.distance.max(), graph.parent.max()))
    if longest > LONGEST:
        raise RobotError(f"{robot!r} has two joints {longest} apart; the model knows paths of up to {LONGEST}")
    full = {"padding": np.arange(size)[None] >= count}
    for name, fill in (("distance", -1), ("parent", 0), ("child", 0)):
        full[name] = np.full((1, size, size), fill, np.int64)
        full[name][0, :count, :count] = getattr(graph, name)
    return {spec.name: full[spec.name].astype(spec.dtype) for spec in engine.inputs if spec.name in full}
