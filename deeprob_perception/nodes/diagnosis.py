# SPDX-License-Identifier: Apache-2.0
"""Why is there no output? Facts about a camera node in, sentences that name the cause out. Imports no ROS."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from deeprob_perception.nodes.traffic import comparable


class Level(IntEnum):
    """The values of diagnostic_msgs/DiagnosticStatus."""

    OK = 0
    WARN = 1
    ERROR = 2


# The share of lost frames that is worth a warning; best effort may lose a few.
LOST = 0.1


@dataclass(frozen=True)
class Cause:
    """One reason. `name` stays the same while the numbers in `text` change; `item` is `model`, `input` or `output`."""

    name: str
    item: str
    level: Level
    text: str


@dataclass(frozen=True)
class Facts:
    """What is known at one moment.

    state: the lifecycle state's label. failure: why the node could not be configured, or "".
    topic, msgtype: what the node subscribes to, `sensor_msgs/msg/Image` or `.../CompressedImage`.
    publishers: those of the right type and fitting QoS. incompatible: policies of the others, as text.
    other_types: types under which the same topic is published. neighbour: the topic of the other image_transport, if
    somebody publishes that. silent: seconds since the last frame (or activation). listeners: of all outputs.
    lost: share of the frames of the last seconds which the transport lost.
    failing: reason of the last frame's failure, or "". age: seconds, of the last stamp; None if it is not known.
    clock_missing: use_sim_time is set and /clock says nothing.
    build_failure: why the wanted engine never came and what serves instead, or "".
    """

    node: str
    state: str
    topic: str
    msgtype: str
    failure: str = ""
    publishers: int = 0
    incompatible: tuple[str, ...] = ()
    other_types: tuple[str, ...] = ()
    neighbour: str = ""
    silent: float = 0.0
    listeners: int = 0
    lost: float = 0.0
    failing: str = ""
    age: float | None = None
    zero_stamps: bool = False
    clock_missing: bool = False
    stale_after: float = 1.0
    build_failure: str = ""


def causes(facts: Facts) -> list[Cause]:
    """Return why there is no output, or why its times cannot be trusted, the first cause first; [] if all is well."""
    return list(_causes(facts))


def _causes(facts: Facts) -> Iterator[Cause]:
    if facts.state != "active":
        if facts.failure:
            yield Cause("not_configured", "model", Level.ERROR, f"not configured: {facts.failure}")
        else:
            verb = "activate" if facts.state == "inactive" else "configure"
            yield Cause("not_active", "output", Level.WARN,
                        f"not active but {facts.state}: `ros2 lifecycle set {facts.node} {verb}`")
        return
    if facts.build_failure:
        yield Cause("build_failed", "model", Level.WARN, facts.build_failure)
    yield from _input_causes(facts)
    if facts.lost > LOST:
        yield Cause("lost", "input", Level.WARN,
                    f"{facts.lost:.0%} of the frames on {facts.topic} are lost in transport: give the publisher's "
                    "process the Fast DDS profile config/fastdds_large_images.xml too, or set "
                    f"qos_overrides.{facts.topic}.subscription.reliability to reliable")
    if facts.failing:
        yield Cause("failing", "input", Level.ERROR, f"the last frame could not be processed: {facts.failing}")
    if not facts.listeners:
        yield Cause("unheard", "output", Level.OK, "nobody listens to any output, so nothing is computed")
    yield from _stamp_causes(facts)


def _input_causes(facts: Facts) -> Iterator[Cause]:
    if facts.incompatible and not facts.publishers:
        yield Cause("incompatible_qos", "input", Level.ERROR,
                    f"incompatible QoS on {facts.topic}: {'; '.join(facts.incompatible)}; override it with the "
                    f"parameters qos_overrides.{facts.topic}.subscription.*")
    elif facts.other_types and not facts.publishers:
        yield Cause("other_type", "input", Level.ERROR,
                    f"{facts.topic} is published as {', '.join(facts.other_types)}, not as {facts.msgtype}"
                    f"{_transport_hint(facts)}")
    elif not facts.publishers:
        yield Cause("no_publisher", "input", Level.WARN, f"nobody publishes {facts.topic}{_transport_hint(facts)}")
    elif facts.silent > facts.stale_after:
        yield Cause("silent", "input", Level.WARN,
                    f"no frame on {facts.topic} for {facts.silent:.1f} s, although it has a publisher")


def _stamp_causes(facts: Facts) -> Iterator[Cause]:
    if facts.clock_missing:
        yield Cause("no_clock", "input", Level.WARN,
                    "use_sim_time is set, but nobody publishes /clock: latency cannot be measured")
    elif facts.age is not None and not comparable(facts.age):
        yield Cause("stale_stamps", "input", Level.WARN,
                    f"stale stamps: the last frame's lies {_apart(facts.age)} the node's clock; if a bag is played or "
                    "a simulation runs, set use_sim_time, otherwise synchronise the camera's clock")
    elif facts.age is not None and facts.age > facts.stale_after:
        yield Cause("stale_stamps", "input", Level.WARN,
                    f"stale stamps: the last frame was {facts.age:.1f} s old when the worker took it "
                    f"(stale_after is {facts.stale_after:g} s)")
    elif facts.zero_stamps:
        yield Cause("zero_stamps", "input", Level.WARN, f"the stamps on {facts.topic} are 0: latency is not available")


def _transport_hint(facts: Facts) -> str:
    if not facts.neighbour:
        return "; is the topic right? (remap `image`, or the launch argument image_topic)"
    other = "raw" if facts.msgtype.endswith("CompressedImage") else "compressed"
    return f", but somebody publishes {facts.neighbour}: set image_transport to {other}"


def _apart(age: float) -> str:
    return f"{age:.1f} s behind" if age > 0 else f"{-age:.1f} s ahead of"
