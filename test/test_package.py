# SPDX-License-Identifier: Apache-2.0
"""The package as such: what it declares, what its parts may import, and that it builds and installs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "deeprob_perception"
SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))
# Folders that a robot runs: none of them may need torch.
RUNTIME = ("messages", "bags", "engines", "segmentation", "tracking", "target", "robots", "policy", "nodes", "replay", "demo")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part(module: str) -> str:
    """Return the part of the package that a module belongs to: `engines`, `replay`, `zoo`, ..."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else ""


@cache
def imports(path: Path) -> frozenset[str]:
    """Return every module that a file imports, at any depth but under `if TYPE_CHECKING`; `from a import b` gives a.b."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children: list[ast.stmt] = node.orelse
        else:
            children = list(ast.iter_child_nodes(node))  # type: ignore[arg-type]
        for child in children:
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path}: relative import; the package writes them in full"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            else:
                yield from walk(child)

    return frozenset(walk(ast.parse(path.read_text(), str(path))))


@cache
def declared() -> dict[str, dict[str, str]]:
    """Return, for the base ("") and each extra, the canonical name of each requirement and the requirement."""
    probe = (
        "import json, setuptools; from distutils.core import run_setup;"
        "d = run_setup('setup.py', stop_after='init');"
        "print(json.dumps({'': d.install_requires, **d.extras_require, '!': [d.get_name(), d.get_version(),"
        " d.get_description(), d.get_license(), d.get_maintainer(), d.get_maintainer_email()]}))"
    )
    out = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    facts = ast.literal_eval(out.strip().splitlines()[-1])
    names = {extra: {canonical(re.match(r"[\w.-]+", row)[0]): row for row in rows}  # type: ignore[index]
             for extra, rows in facts.items() if extra != "!"}
    return names | {"!": dict(enumerate(facts["!"]))}  # type: ignore[dict-item]


def manifest() -> ElementTree.Element:
    return ElementTree.parse(ROOT / "package.xml").getroot()


def test_setup_py_and_package_xml_say_the_same() -> None:
    xml = manifest()
    maintainer = xml.find("maintainer")
    assert maintainer is not None
    told = [xml.findtext(tag) for tag in ("name", "version", "description", "license")]
    assert list(declared()["!"].values()) == [*told, maintainer.text, maintainer.get("email")]
    assert xml.get("format") == "3"
    assert xml.findtext("export/build_type") == "ament_python"
    assert (ROOT / "resource" / PACKAGE).is_file()


def test_dependencies_page_lists_exactly_what_setup_py_installs() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text()
    sections = re.split(r"^## ", page, flags=re.M)[1:]
    listed: dict[str, set[str]] = {}
    for section in sections:
        title = section.split("\n", 1)[0]
        if title.startswith("Not Python"):
            continue
        extra = re.match(r"`(\w+)`", title)
        rows = [line.split("|") for line in section.splitlines() if line.startswith("|")][2:]
        assert all(row[2].strip() for row in rows), f"{title}: a dependency without a reason"
        listed[extra[1] if extra else ""] = {canonical(row[1].strip().split("[")[0]) for row in rows}
    assert listed == {extra: set(names) for extra, names in declared().items() if extra != "!"}


def test_every_import_is_declared_and_every_base_dependency_imported() -> None:
    """Undeclared: works here, fails on a fresh machine. Unused: every user installs it for nothing."""
    ros = {element.text for element in manifest().iter("exec_depend")}
    owners = packages_distributions()
    promised = {name for extra, names in declared().items() if extra not in ("!", "test", "ros") for name in names}
    standard = {*sys.stdlib_module_names, "compression", PACKAGE}  # compression is Python 3.14's
    used: set[str] = set()
    unknown: set[str] = set()
    for path in SOURCES:
        for module in {name.split(".")[0] for name in imports(path)} - standard:
            distributions = {canonical(name) for name in owners.get(module, [])}
            used |= distributions
            # safetensors.torch, say, is installed by another extra's package as well: any declared owner will do.
            if module not in ros and not distributions & promised:
                unknown.add(f"{dotted(path)} imports {module}")
    assert not unknown
    assert set(declared()[""]) - used == set(), "declared in install_requires, imported nowhere"


def test_the_readmes_robot_installs_all_that_the_package_needs() -> None:
    """There, rosdep installs what package.xml names and pip what the README names; setup.py is not asked."""
    by_rosdep = {"python3-numpy": "numpy", "python3-opencv": "opencv-python-headless", "python3-jinja2": "jinja2",
                 "python3-matplotlib": "matplotlib"}  # fmt: skip
    come_along = {"rich": "typer", "protobuf": "onnx", "ruamel-yaml": "rosbags", "backports-zstd": "rosbags"}
    (line,) = re.findall(r"^pip install (.*?)  # what rosdep has no key for$", (ROOT / "README.md").read_text(), flags=re.M)
    by_pip = {canonical(re.match(r"[\w.-]+", word.strip('"'))[0]) for word in line.split()}  # type: ignore[index]
    installed = by_pip | {by_rosdep[element.text] for element in manifest().iter("exec_depend") if element.text in by_rosdep}
    installed |= {name for name, brought_by in come_along.items() if brought_by in by_pip}
    assert set(declared()[""]) - installed == set()


def test_only_nodes_import_ros() -> None:
    """Replay, training and the command line must run where no ROS is installed."""
    ros = {element.text for element in manifest().iter("exec_depend")}
    # These are asked for, and done without (or asked of the user) where they are absent.
    optional = {"messages": {"cv_bridge"}, "share": {"ament_index_python"}, "doctor": {"rclpy"}}
    for path in SOURCES:
        here = part(dotted(path))
        found = {name.split(".")[0] for name in imports(path)} & ros
        assert here == "nodes" or found <= optional.get(here, set()), f"{dotted(path)} imports {sorted(found)}"


def test_imports_point_one_way() -> None:
    """Tasks know no transport, networks no task, and nothing depends on the edges: nodes and the command line."""
    core = {"isolation", "errors", "files", "share", "timing"}
    allowed = {
        "messages": core,
        "bags": core | {"messages", "video"},
        "engines": core,
        "segmentation": core | {"engines"},
        "tracking": core | {"engines"},
        "robots": core,
        "target": core | {"robots"},
        "policy": core | {"engines", "robots"},
        "nets": core,
        "nodes": core | {"messages", "bags", "engines", "segmentation", "tracking", "target", "policy", "robots", "zoo", "sim"},
    }
    edges = {"nodes", "cli", "__main__"}
    # The one back end that is made of the network itself, which it reaches within functions: see its docstring.
    upward = {f"{PACKAGE}.engines.torch": {"program", "nets"}}
    for path in SOURCES:
        here = part(dotted(path))
        targets = {part(name) for name in imports(path) if name.startswith(f"{PACKAGE}.")} - {here}
        if here not in ("cli", "__main__"):
            assert not targets & edges, f"{dotted(path)} imports {sorted(targets & edges)}"
        if here in allowed:
            targets -= upward.get(dotted(path), set())
            assert targets <= allowed[here], f"{dotted(path)} imports {sorted(targets - allowed[here])}"


def test_runtime_needs_no_torch() -> None:
    for path in SOURCES:
        # The back end `torch` imports it when it is asked for; nothing in engines/ does at module level, as tried below.
        if part(dotted(path)) in RUNTIME and dotted(path) != f"{PACKAGE}.engines.torch":
            heavy = {name.split(".")[0] for name in imports(path)} & {"torch", "transformers", "safetensors", "mujoco"}
            assert not heavy, f"{dotted(path)} imports {sorted(heavy)}"
    # What they import in turn, by importing it: everything a robot without torch needs, with torch made unfindable.
    modules = [dotted(path) for path in SOURCES if part(dotted(path)) in RUNTIME and part(dotted(path)) != "nodes"]
    script = "import sys, importlib\nfor absent in ('torch', 'transformers', 'safetensors', 'mujoco', 'rclpy'):\n" \
             "    sys.modules[absent] = None\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    subprocess.run([sys.executable, "-c", script, *modules], check=True, cwd=ROOT)


def test_help_imports_nothing_heavy() -> None:
    """`deeprob --help` must answer at once, and everywhere."""
    script = "import sys\nsys.argv = ['deeprob', '--help']\nfrom deeprob_perception.cli import main\ntry:\n    main()\n" \
             "except SystemExit as stop:\n    assert not stop.code, stop.code\n" \
             "heavy = {'torch', 'rclpy', 'cv2', 'openvino', 'onnxruntime', 'onnx', 'matplotlib', 'mujoco', 'av', 'rosbags'}\n" \
             "sys.exit(f'imports {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("bag", "bench", "build", "demo", "doctor", "eval", "export", "models", "play", "quantize", "replay", "sim",
                    "train"):  # fmt: skip
        assert re.search(rf"\b{command}\b", done.stdout), f"{command} is missing from the help:\n{done.stdout}"


def own_files(*suffixes: str) -> list[Path]:
    """Return the files of the checkout with one of these suffixes, leaving out builds, environments and results."""
    skipped = {".venv", ".venv-sourced", ".git", "build", "install", "log", "out", "runs", "__pycache__"}
    return [Path(folder) / name
            for folder, folders, names in os.walk(ROOT)
            if not folders.__setitem__(slice(None), [f for f in folders if f not in skipped])  # type: ignore[func-returns-value]
            for name in names if name.endswith(suffixes)]


def test_every_source_file_names_its_licence_first() -> None:
    files = [*own_files(".py", ".sh", ".yaml", ".yml"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    assert len(files) > 50
    for path in files:
        lines = path.read_text().splitlines()
        first = lines[1] if lines and lines[0].startswith("#!") else (lines or [""])[0]
        assert first == "# SPDX-License-Identifier: Apache-2.0", f"{path.relative_to(ROOT)} starts with {first!r}"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("workspace") / "src" / PACKAGE
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
        ".*", "build", "install", "log", "out", "runs", "*.egg-info", "__pycache__", "test"))
    return copy


def shipped(folder: str) -> set[str]:
    return {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*") if path.is_file() and path.name[0] != "."}


SHIPPED = sorted(set().union(*(shipped(folder) for folder in ("launch", "config", "models", "bags"))))


@pytest.mark.slow
def test_colcon_builds_and_the_installed_package_finds_its_files(checkout: Path) -> None:
    pytest.importorskip("colcon_core", reason="colcon is not installed (extra `test`)")
    pytest.importorskip("ament_index_python", reason="ament_index_python is not installed (extra `ros`)")
    workspace = checkout.parents[1]
    done = subprocess.run([sys.executable, "-m", "colcon", "build"], cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    prefix = workspace / "install" / PACKAGE
    share = prefix / "share" / PACKAGE
    assert {name for name in SHIPPED if not (share / name).is_file()} == set()
    assert (prefix / "share/ament_index/resource_index/packages" / PACKAGE).is_file()
    # `ros2 run deeprob_perception X` looks for X here.
    for executable in ("deeprob", "segmentation"):
        assert os.access(prefix / "lib" / PACKAGE / executable, os.X_OK)
    site = next(prefix.glob("lib/python3*/site-packages"))
    script = f"import {PACKAGE}; from {PACKAGE}.share import share_dir; print({PACKAGE}.__file__, share_dir(), sep='\\n')"
    unset = {name: value for name, value in os.environ.items() if name != "AMENT_PREFIX_PATH"}
    # With a sourced setup.bash, and without: ROS from PyPI sets no prefix path, and pip installs to <prefix>/share too.
    for environment in (unset | {"AMENT_PREFIX_PATH": str(prefix)}, unset):
        found = subprocess.run([sys.executable, "-c", script], cwd=workspace, env=environment | {"PYTHONPATH": str(site)},
                               capture_output=True, text=True)
        assert found.stdout.splitlines() == [str(site / PACKAGE / "__init__.py"), str(share)], found.stderr


@pytest.mark.slow
def test_a_wheel_carries_launch_config_models_and_bags(checkout: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(checkout)],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    data = next(name for name in names if name.endswith(f"share/{PACKAGE}/package.xml")).removesuffix("package.xml")
    assert {name for name in SHIPPED if data + name not in names} == set()
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).rglob("*.html")}
    assert templates <= names


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_keeps_a_sourced_ros_out_of_its_own(tmp_path: Path) -> None:
    """Two distributions' libraries in one process fail to load, and most who have ROS have sourced it in every shell."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text("#!/bin/sh\nenv\n")
    python.chmod(0o755)
    for stamp in ("python", "demo", "test", "rendering"):
        (tmp_path / f".stamp-{stamp}").touch()
    sourced = {"ROS_DISTRO": "humble", "PYTHONPATH": "/opt/ros/humble/lib/python3.10/site-packages",
               "LD_LIBRARY_PATH": "/opt/ros/humble/lib", "AMENT_PREFIX_PATH": "/opt/ros/humble"}  # fmt: skip
    cuda = {"LD_LIBRARY_PATH": "/usr/local/cuda/lib64"}
    chosen = {"RMW_IMPLEMENTATION": "rmw_cyclonedds_cpp", **cuda}
    for ros, given, kept in (("wheels", sourced, {}), ("wheels", chosen, cuda), ("sourced", sourced, sourced)):
        bare = {name: value for name, value in os.environ.items() if name not in {*sourced, *chosen}}
        seen = subprocess.run(["make", "-s", "test", f"ROS={ros}", f"VENV={tmp_path}"], cwd=ROOT, env=bare | given,
                              capture_output=True, text=True, check=True).stdout.splitlines()  # fmt: skip
        assert {line for line in seen if line.split("=")[0] in {*sourced, *chosen}} == {f"{k}={v}" for k, v in kept.items()}


def test_setup_asks_for_a_sourced_ros_where_that_is_meant(tmp_path: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = sys.executable if sys.prefix == sys.base_prefix else getattr(sys, "_base_executable", "python3")
    done = subprocess.run(["bash", "tools/setup.sh", "venv", str(tmp_path / "venv"), "sourced"], cwd=ROOT, capture_output=True,
                          text=True, env=bare | {"PYTHON": python})  # fmt: skip
    if done.returncode == 0:
        pytest.skip("this machine's Python has an rclpy")
    assert "source its setup.bash" in done.stderr and not (tmp_path / "venv").exists()


def test_setup_names_the_python_versions_that_fit(tmp_path: Path) -> None:
    """A machine whose Python is too old gets one clear line, not a failing pip."""
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo Python 3.8.1 && exit\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(["bash", "tools/setup.sh", "venv", str(tmp_path / "venv"), "wheels"], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"PYTHON": str(old)})
    assert done.returncode == 1
    assert "3.10 to 3.13" in done.stderr and "Python 3.8.1" in done.stderr
    assert not (tmp_path / "venv").exists()
