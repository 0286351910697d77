# SPDX-License-Identifier: Apache-2.0
"""Robot descriptions: graphs and kinematics against reference tensors and MuJoCo, and what is refused, in bounded time."""

import contextlib
import json
import re
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeprob_perception import robots
from deeprob_perception.errors import RobotError
from deeprob_perception.robots.robot import euler
from deeprob_perception.robots.urdf import rotation

REAL = ("allegro_hand_right", "franka_panda", "so101", "stretch_se3", "ur5e")


def arm(*joints: str, links: int = 4, head: str = "") -> str:
    """Return a URDF of `links` links l0, l1, ... and the joints given as XML."""
    named = "".join(f"<link name='l{i}'/>" for i in range(links))
    return f"{head}<robot name='test'>{named}{''.join(joints)}</robot>"


LIMIT = '<limit lower="-1" upper="2" velocity="3"/>'


def joint(name, parent, child, kind="revolute", xyz="0 0 0.1", axis="0 0 1", inner=LIMIT):
    return (f'<joint name="{name}" type="{kind}"><origin xyz="{xyz}" rpy="0.1 -0.2 0.3"/><parent link="{parent}"/>'
            f'<child link="{child}"/><axis xyz="{axis}"/>{inner}</joint>')  # fmt: skip


CHAIN = (joint("a", "l0", "l1"), joint("b", "l1", "l2", axis="0 1 0"), joint("c", "l2", "l3", "prismatic", axis="1 0 0"))


# Reference tensors and robots -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hands(shared):
    from safetensors import safe_open

    with safe_open(shared / "golden" / "get" / "graphs_and_fk_24.safetensors", framework="np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        meta = {k: json.loads(v) if v[:1] in "[{" else v for k, v in file.metadata().items()}
    return tensors, meta


def test_graphs_geometry_and_kinematics_of_24_hands_are_the_references(shared, hands):
    tensors, meta = hands
    ids = sorted({key.split(".")[0] for key in tensors})
    assert len(ids) == 24
    orders = next(value for value in meta.values() if isinstance(value, dict) and set(ids) <= set(value))
    for hand in ids:
        robot = robots.Robot(robots.read(shared / "robots" / "leap_variants" / f"{hand}.urdf"))
        assert list(robot.joint_names) == orders[hand]
        graph = robot.graph()
        for ours, theirs in (("distance", "spd"), ("parent", "parent"), ("child", "child")):
            np.testing.assert_array_equal(getattr(graph, ours), tensors[f"{hand}.{theirs}"], f"{hand} {theirs}")
        np.testing.assert_allclose(robot.origins[:, :3, 3], tensors[f"{hand}.joint_origin"], atol=1e-9)
        # As matrices: two triples of angles may mean one turn.
        given = np.array([rotation(*angles) for angles in tensors[f"{hand}.joint_rot"]])
        np.testing.assert_allclose(robot.origins[:, :3, :3], given, atol=1e-7)
        np.testing.assert_allclose(robot.axes, tensors[f"{hand}.joint_axis"], atol=1e-9)
        np.testing.assert_allclose(np.stack((robot.lower, robot.upper), -1), tensors[f"{hand}.joint_angle_limits"], atol=1e-9)
        found = robot.forward_kinematics(tensors[f"{hand}.fk_q"])
        np.testing.assert_allclose(found[..., :3, 3], tensors[f"{hand}.fk_position"], atol=1e-6)


def test_angles_of_the_tokens_are_the_references(shared, hands):
    """The network reads raw angles, so a turn must be written as it was in training, at the singularity too."""
    tensors, _ = hands
    for hand in sorted({key.split(".")[0] for key in tensors}):
        robot = robots.Robot(robots.read(shared / "robots" / "leap_variants" / f"{hand}.urdf"))
        found, given = euler(robot.origins[:, :3, :3]), tensors[f"{hand}.joint_rot"]
        apart = np.abs(found - given)
        apart = np.minimum(apart, np.abs(apart - 2 * np.pi))  # -pi and pi
        np.testing.assert_allclose(apart, 0, atol=2e-3)


def without_shapes(path):
    """Return a URDF's text without what MuJoCo would look for on the disk."""
    root = ElementTree.parse(path).getroot()
    for link in root.findall("link"):
        for part in ("visual", "collision"):
            for shape in link.findall(part):
                link.remove(shape)
    for other in root.findall("transmission") + root.findall("gazebo"):
        root.remove(other)
    option = ElementTree.SubElement(ElementTree.SubElement(root, "mujoco"), "compiler")
    option.attrib = {"fusestatic": "false", "boundmass": "0.01", "boundinertia": "0.001", "balanceinertia": "true"}
    return ElementTree.tostring(root, encoding="unicode")


@pytest.mark.parametrize("name", REAL)
def test_poses_and_jacobians_of_real_robots_are_mujocos(shared, name):
    mujoco = pytest.importorskip("mujoco", reason="needs the extra `sim`")
    path = shared / "robots" / "real" / f"{name}.urdf"
    robot = robots.Robot(robots.read(path))
    model = mujoco.MjModel.from_xml_string(without_shapes(path))
    data = mujoco.MjData(model)
    random = np.random.default_rng(0)
    low, high = (np.where(np.isfinite(limit), limit, other) for limit, other in ((robot.lower, -3.0), (robot.upper, 3.0)))
    for _ in range(5):
        positions = random.uniform(low, high)
        for joint_name, value in zip(robot.joint_names, positions, strict=True):
            data.qpos[model.joint(joint_name).qposadr[0]] = value
        for follower in (j for j in robots.read(path).joints if j.mimic):  # MuJoCo holds these by a force
            leader, multiplier, offset = follower.mimic
            data.qpos[model.joint(follower.name).qposadr[0]] = positions[robot.joint_names.index(leader)] * multiplier + offset
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        links = [link for link in robot.links if link != robot.root]
        poses = robot.forward_kinematics(positions, links)
        for link, pose in zip(links, poses, strict=True):
            np.testing.assert_allclose(pose[:3, 3], data.body(link).xpos, atol=1e-6, err_msg=link)
            np.testing.assert_allclose(pose[:3, :3], data.body(link).xmat.reshape(3, 3), atol=1e-6, err_msg=link)
        tip = robot.joint_links[-1]
        linear, angular = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        mujoco.mj_jacBody(model, data, linear, angular, model.body(tip).id)
        columns = [model.joint(joint_name).dofadr[0] for joint_name in robot.joint_names]
        if not any(j.mimic for j in robots.read(path).joints):
            np.testing.assert_allclose(robot.jacobian(positions, tip), np.vstack((linear, angular))[:, columns], atol=1e-6)


@pytest.mark.parametrize("name", REAL)
def test_jacobians_are_the_slopes_of_the_poses(shared, name):
    robot = robots.Robot(robots.read(shared / "robots" / "real" / f"{name}.urdf"))
    random, step = np.random.default_rng(1), 1e-6
    low, high = (np.where(np.isfinite(limit), limit, other) for limit, other in ((robot.lower, -3.0), (robot.upper, 3.0)))
    positions = random.uniform(low, high, (3, len(low)))
    for link in (robot.joint_links[-1], robot.links[-1]):
        jacobian = robot.jacobian(positions, link)
        for i in range(len(low)):
            ahead, behind = positions.copy(), positions.copy()
            ahead[:, i] += step
            behind[:, i] -= step
            apart = robot.forward_kinematics(ahead, [link]) - robot.forward_kinematics(behind, [link])
            np.testing.assert_allclose(jacobian[:, :3, i], apart[:, 0, :3, 3] / (2 * step), atol=1e-6)


# Choices --------------------------------------------------------------------------------------------------------------


def test_root_tip_and_joints_choose_what_moves(shared):
    urdf = robots.read(shared / "robots" / "real" / "franka_panda.urdf")
    whole = robots.Robot(urdf)
    assert len(whole.joint_names) == 8  # one finger mimics the other
    hand = robots.Robot(urdf, tip="panda_hand")
    assert hand.joint_names == tuple(f"panda_joint{i}" for i in range(1, 8))
    forearm = robots.Robot(urdf, root="panda_link4", tip="panda_hand")
    assert forearm.joint_names == ("panda_joint5", "panda_joint6", "panda_joint7")
    chosen = robots.Robot(urdf, tip="panda_hand", joints=["panda_joint2", "panda_joint4"])
    assert chosen.joint_names == ("panda_joint2", "panda_joint4")
    assert chosen.graph().distance.tolist() == [[0, 1], [1, 0]]
    # Joint 4 cannot stand at 0: where it is not moved it stays at its limit next to it.
    np.testing.assert_allclose(
        robots.Robot(urdf, tip="panda_hand", joints=["panda_joint1"]).forward_kinematics(np.zeros(1), ["panda_hand"]),
        hand.forward_kinematics(np.clip(np.zeros(7), hand.lower, hand.upper), ["panda_hand"]), atol=1e-12)  # fmt: skip


def test_a_mimic_joint_follows_and_its_share_is_in_the_jacobian():
    follower = joint("f", "l1", "l2", inner='<limit lower="-9" upper="9"/><mimic joint="a" multiplier="-2" offset="0.5"/>')
    robot = robots.Robot(robots.parse(arm(joint("a", "l0", "l1"), follower, links=3)))
    assert robot.joint_names == ("a",)
    free = robots.Robot(robots.parse(arm(joint("a", "l0", "l1"), joint("f", "l1", "l2"), links=3)))
    found = robot.forward_kinematics(np.array([0.3]), ["l2"])
    np.testing.assert_allclose(found, free.forward_kinematics(np.array([0.3, -0.1]), ["l2"]), atol=1e-12)
    np.testing.assert_allclose(robot.jacobian(np.array([0.3]), "l2")[:, 0],
                               free.jacobian(np.array([0.3, -0.1]), "l2") @ [1, -2], atol=1e-12)  # fmt: skip


def test_continuous_joints_have_no_ends_and_fixed_ones_join_their_links():
    spin = joint("spin", "l0", "l1", "continuous", inner="")
    robot = robots.Robot(robots.parse(arm(spin, joint("weld", "l1", "l2", "fixed"), joint("b", "l2", "l3"))))
    assert robot.joint_names == ("spin", "b")
    assert np.isinf([robot.lower[0], robot.upper[0], robot.velocity[0]]).all()
    assert (robot.lower[1], robot.upper[1], robot.velocity[1]) == (-1, 2, 3)
    graph = robot.graph()
    assert graph.parent.tolist() == [[0, 0], [1, 0]]
    assert graph.child.tolist() == [[0, 1], [0, 0]]


def test_branches_are_neighbours_on_one_body():
    tree = arm(joint("a", "l0", "l1"), joint("b", "l1", "l2"), joint("c", "l1", "l3"), joint("d", "l3", "l4"), links=5)
    graph = robots.Robot(robots.parse(tree)).graph()
    assert graph.distance.tolist() == [[0, 1, 1, 2], [1, 0, 1, 2], [1, 1, 0, 1], [2, 2, 1, 0]]
    assert graph.parent.tolist() == [[0] * 4, [1, 0, 0, 0], [1, 0, 0, 0], [2, 0, 1, 0]]


def test_a_batch_gives_what_each_gives_alone():
    robot = robots.Robot(robots.parse(arm(*CHAIN)))
    positions = np.random.default_rng(0).uniform(-1, 1, (2, 5, 3))
    poses, jacobians = robot.forward_kinematics(positions), robot.jacobian(positions, "l3")
    assert poses.shape == (2, 5, 3, 4, 4) and jacobians.shape == (2, 5, 6, 3)
    np.testing.assert_allclose(poses[1, 2], robot.forward_kinematics(positions[1, 2]))
    np.testing.assert_allclose(jacobians[1, 2], robot.jacobian(positions[1, 2], "l3"))


@given(st.tuples(*[st.floats(-3.1, 3.1)] * 3))
def test_euler_angles_give_their_matrix_back(angles):
    matrix = rotation(*angles)
    np.testing.assert_allclose(rotation(*euler(matrix)), matrix, atol=1e-6)


# Refusals -------------------------------------------------------------------------------------------------------------

ENTITIES = "".join(f"<!ENTITY {'bcdefghij'[i]} '{f'&{chr(97 + i)};' * 10}'>" for i in range(9))
BOMB = f"<!DOCTYPE r [<!ENTITY a 'ha'>{ENTITIES}]>"
REFUSED = {
    "no XML": ("hello", "no XML"),
    "empty": ("", "no XML"),
    "cut off": (arm(*CHAIN)[:-20], "no XML"),
    "another format": ("<sdf><model name='m'/></sdf>", "<sdf>, not <robot>"),
    "an entity bomb": (arm(*CHAIN, head=BOMB), "holds a DTD"),
    "an outer file": (arm(*CHAIN, head="<!DOCTYPE r SYSTEM 'file:///etc/passwd'>"), "holds a DTD"),
    "no links": ("<robot name='r'/>", "no links"),
    "a circle": (arm(joint("a", "l0", "l1"), joint("b", "l1", "l0"), links=2), "in a circle"),
    "a circle beside the tree": (arm(joint("a", "l1", "l2"), joint("b", "l2", "l1"), links=3), "hang on one another"),
    "two roots": (arm(joint("a", "l0", "l1"), links=3), "2 roots (l0, l2)"),
    "two carriers": (arm(joint("a", "l0", "l2"), joint("b", "l1", "l2"), links=3), "hangs on two joints, 'a' and 'b'"),
    "an unknown link": (arm(joint("a", "l0", "l9"), links=1), "names the link 'l9'"),
    "two joints of one name": (arm(joint("a", "l0", "l1"), joint("a", "l1", "l2"), links=3), "two joints of the robot are"),
    "two links of one name": ("<robot><link name='x'/><link name='x'/></robot>", "two links of the robot are called 'x'"),
    "no limits": (arm(joint("a", "l0", "l1", inner=""), links=2), "revolute joint 'a' has no limits"),
    "crossed limits": (arm(joint("a", "l0", "l1", inner="<limit lower='2' upper='1'/>"), links=2), "lower lies above"),
    "not a number": (arm(joint("a", "l0", "l1", xyz="0 0 nan"), links=2), "not 3 finite numbers"),
    "an infinite limit": (arm(joint("a", "l0", "l1", inner="<limit lower='-inf' upper='1'/>"), links=2), "not 1 finite"),
    "words for numbers": (arm(joint("a", "l0", "l1", xyz="up and away"), links=2), "not 3 numbers"),
    "two of three": (arm(joint("a", "l0", "l1", axis="1 0"), links=2), "not 3 finite numbers"),
    "a zero axis": (arm(joint("a", "l0", "l1", axis="0 0 0"), links=2), "axis of the joint 'a' is zero"),
    "a floating joint": (arm(joint("a", "l0", "l1", "floating"), links=2), "'a' is floating, which cannot be expressed"),
    "an unknown kind": (arm(joint("a", "l0", "l1", "hinge"), links=2), "has the type 'hinge'"),
    "no parent": ("<robot><link name='x'/><joint name='j' type='fixed'><child link='x'/></joint></robot>", "no parent link"),
    "too many links": (arm(links=10_000), "10000 links; at most 2000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_robot_is_refused_by_name_and_at_once(case):
    text, message = REFUSED[case]
    start = time.process_time()
    with pytest.raises(RobotError, match=re.escape(message)):
        robots.parse(text)
    assert time.process_time() - start < 5  # a bomb would take hours and all memory


@pytest.mark.parametrize(("options", "message"), [
    ({"root": "l9"}, "no link 'l9' to be the root"),
    ({"tip": "l9"}, "no link 'l9' to be the tip"),
    ({"root": "l2", "tip": "l1"}, "'l1' does not hang on 'l2'"),
    ({"joints": ["a", "zz"]}, "no joint zz can be moved"),
    ({"root": "l3"}, "nothing moves below the link 'l3'"),
])  # fmt: skip
def test_wrong_choices_say_what_there_is(options, message):
    with pytest.raises(RobotError, match=re.escape(message)):
        robots.Robot(robots.parse(arm(*CHAIN)), **options)


@pytest.mark.parametrize(("mimics", "message"), [
    ({"a": "zz"}, "mimics 'zz', which is not below the root"),
    ({"a": "b", "b": "a"}, "mimics itself"),
])  # fmt: skip
def test_a_mimic_that_leads_nowhere_is_refused(mimics, message):
    limit = '<limit lower="-1" upper="1"/>'
    joints = [joint(name, f"l{i}", f"l{i + 1}", inner=limit + (f'<mimic joint="{mimics[name]}"/>' if name in mimics else ""))
              for i, name in enumerate("abc")]  # fmt: skip
    with pytest.raises(RobotError, match=re.escape(message)):
        robots.Robot(robots.parse(arm(*joints)))


def test_errors_of_a_file_name_it(tmp_path):
    (tmp_path / "broken.urdf").write_text(arm(joint("a", "l0", "l1", "hinge"), links=2))
    with pytest.raises(RobotError, match=r"broken\.urdf: the joint 'a' has the type"):
        robots.read(tmp_path / "broken.urdf")
    with pytest.raises(RobotError, match=r"cannot read .*nowhere\.urdf: No such file"):
        robots.read(tmp_path / "nowhere.urdf")


def test_positions_of_another_number_of_joints_are_refused():
    robot = robots.Robot(robots.parse(arm(*CHAIN)))
    with pytest.raises(RobotError, match="'test' moves 3 joints"):
        robot.forward_kinematics(np.zeros(4))


@given(st.text(max_size=200))
def test_any_text_is_a_robot_or_a_robot_error(text):
    with contextlib.suppress(RobotError):
        robots.parse(text)


@given(st.integers(0, 600), st.binary(min_size=1, max_size=8))
def test_a_damaged_description_is_a_robot_or_a_robot_error(place, noise):
    content = arm(*CHAIN).encode()
    with contextlib.suppress(RobotError):
        robots.Robot(robots.parse(content[:place] + noise + content[place + len(noise) :]))
