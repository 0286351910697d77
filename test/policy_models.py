# SPDX-License-Identifier: Apache-2.0
"""A robot written by hand, and policy models of a few nodes that follow the contract: for tests without torch."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from deeprob_perception.policy import leap
from deeprob_perception.policy.tokens import LAYOUT, TOKEN

# A pan and two elbows that turn, then a slide to the tool; a gripper's finger that mimics and a wheel off the chain.
JOINTS = ("pan", "shoulder", "elbow", "slide")
LOWER, UPPER = np.array([-2.0, -1.5, -2.0, 0.0]), np.array([2.0, 1.5, 2.0, 0.2])
VELOCITY = np.array([3.0, 3.0, 3.0, 0.4])


def urdf(upper_arm: float = 0.3, **renamed: str) -> str:
    """Return the robot's description. :param upper_arm: length, m. :param renamed: joints by their new names."""
    pan, shoulder, elbow, slide = (renamed.get(name, name) for name in JOINTS)
    return f"""<robot name="arm">
      <link name="base"/><link name="turret"/><link name="upper"/><link name="fore"/><link name="rod"/><link name="tool"/>
      <link name="wheel"/>
      <joint name="{pan}" type="revolute"><parent link="base"/><child link="turret"/><origin xyz="0 0 0.1"/>
        <axis xyz="0 0 1"/><limit lower="-2" upper="2" velocity="3"/></joint>
      <joint name="{shoulder}" type="revolute"><parent link="turret"/><child link="upper"/><origin xyz="0 0 0.1"/>
        <axis xyz="0 1 0"/><limit lower="-1.5" upper="1.5" velocity="3"/></joint>
      <joint name="{elbow}" type="revolute"><parent link="upper"/><child link="fore"/><origin xyz="{upper_arm} 0 0"/>
        <axis xyz="0 1 0"/><limit lower="-2" upper="2" velocity="3"/></joint>
      <joint name="{slide}" type="prismatic"><parent link="fore"/><child link="rod"/><origin xyz="0.2 0 0"/>
        <axis xyz="1 0 0"/><limit lower="0" upper="0.2" velocity="0.4"/></joint>
      <joint name="flange" type="fixed"><parent link="rod"/><child link="tool"/><origin xyz="0.1 0 0"/></joint>
      <joint name="spin" type="continuous"><parent link="base"/><child link="wheel"/><axis xyz="0 1 0"/></joint>
    </robot>"""


def hand(fingers: int = 2) -> str:
    """Return a hand whose joints have numbers for names, two a finger."""
    text = '<robot name="hand"><link name="palm"/>'
    for finger in range(fingers):
        before = "palm"
        for joint in range(2):
            number = 2 * finger + joint
            text += f"""<link name="l{number}"/><joint name="{number}" type="revolute"><parent link="{before}"/>
              <child link="l{number}"/><origin xyz="0.05 {0.03 * finger} 0" rpy="0 0 0.1"/><axis xyz="0 0 -1"/>
              <limit lower="-0.5" upper="2" velocity="8"/></joint>"""
            before = f"l{number}"
    return text + "</robot>"


def reach_model(path: Path, gain: float = 1.0, slots: int = 6) -> Path:
    """Write a policy that descends to the goal by the transposed Jacobian, and answers NaN while the goal lies right below.

    Its self-model puts every joint at the root.
    """
    nodes = [
        *pick("along", 31),  # of a token: how far the tip comes along by this joint
        *pick("down", 30),  # the direction to the goal, z
        helper.make_node("Add", ["down", "nine_tenths"], ["room"]),
        helper.make_node("Sqrt", ["room"], ["root"]),  # NaN below
        helper.make_node("Mul", ["root", "zero"], ["poison"]),
        helper.make_node("Mul", ["along", "gain"], ["wish"]),
        helper.make_node("Add", ["wish", "poison"], ["action3"]),
        helper.make_node("Squeeze", ["action3", "last"], ["action"]),
        helper.make_node("Slice", ["tokens", "start0", "stop3", "last"], ["three"]),
        helper.make_node("Mul", ["three", "zero"], ["forward_kinematics"]),
    ]
    return write(path, nodes, "reach", TOKEN, slots, ("action", "forward_kinematics"), gain, layout=LAYOUT)


def leap_model(path: Path, gain: float = 1.0, slots: int = 16) -> Path:
    """Write a policy that pushes every joint by the sine of the phase."""
    nodes = [
        *pick("sine", 5),  # the newest of six
        helper.make_node("Mul", ["sine", "gain"], ["wish"]),
        helper.make_node("Squeeze", ["wish", "last"], ["policy"]),
        helper.make_node("Slice", ["tokens", "start0", "stop3", "last"], ["three"]),
        helper.make_node("Mul", ["three", "zero"], ["policy_forward_kinematics"]),
    ]
    outputs = ("policy", "policy_forward_kinematics")
    return write(path, nodes, "leap_rotation", leap.TOKEN, slots, outputs, gain, layout=leap.LAYOUT)


def pick(name: str, feature: int) -> list:
    """Return nodes that take one feature of each token, `[1, N, 1]`."""
    value = helper.make_tensor(f"{name}_at", TensorProto.INT64, [1], [feature])
    return [
        helper.make_node("Constant", [], [f"{name}_index"], value=value),
        helper.make_node("Gather", ["tokens", f"{name}_index"], [name], axis=2),
    ]


def write(
    path: Path, nodes: list, task: str, features: int, slots: int, outputs: tuple[str, str], gain: float, **metadata: str
) -> Path:
    floats = {"gain": gain, "zero": 0.0, "nine_tenths": 0.9}
    integers = {"last": 2, "start0": 0, "stop3": 3}
    square = [1, slots, slots]
    graph = helper.make_graph(
        nodes, "policy",
        [
            helper.make_tensor_value_info("tokens", TensorProto.FLOAT, [1, slots, features]),
            *(helper.make_tensor_value_info(name, TensorProto.INT64, square) for name in ("distance", "parent", "child")),
            helper.make_tensor_value_info("padding", TensorProto.BOOL, [1, slots]),
        ],
        [
            helper.make_tensor_value_info(outputs[0], TensorProto.FLOAT, [1, slots]),
            helper.make_tensor_value_info(outputs[1], TensorProto.FLOAT, [1, slots, 3]),
        ],
        [
            *(helper.make_tensor(name, TensorProto.FLOAT, [1], [value]) for name, value in floats.items()),
            *(helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in integers.items()),
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    for key, value in {"contract": "1", "task": task, "name": path.stem, **metadata}.items():
        model.metadata_props.add(key=f"deeprob.{key}", value=value)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path
