# SPDX-License-Identifier: Apache-2.0
"""ament_python package; the same file makes it pip-installable. docs/dependencies.md says why each one is here."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = "deeprob_perception"

# One ROS distribution: mixing Jazzy's and Kilted's wheels installs, and fails when the libraries load.
RCLPY = "7.1.6"
INTERFACES = "5.3.6"

# A Jetson has JetPack's TensorRT instead.
TENSORRT_RTX = "tensorrt-rtx-cu13>=1.2; platform_machine == 'x86_64' and python_version < '3.14'"


def share(*folders: str) -> list[tuple[str, list[str]]]:
    """Return the data_files rows that install each folder's files into the package's share folder."""
    rows = []
    for folder in folders:
        files = [str(path) for path in sorted(Path(folder).glob("*")) if path.is_file() and path.name[0] != "."]
        if files:
            rows.append((f"share/{PACKAGE}/{folder}", files))
    return rows


setup(
    name=PACKAGE,
    version="0.1.0",
    description="ROS 2 perception for robots with cameras: Swin segmentation, trained, exported, replayed and run",
    license="Apache-2.0",
    maintainer="deeprob_perception maintainers",
    maintainer_email="maintainers@example.com",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={PACKAGE: ["py.typed", "**/*.html", "**/*.css"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (f"share/{PACKAGE}", ["package.xml"]),
        *share("launch", "config", "models", "bags"),
    ],
    python_requires=">=3.10",
    install_requires=[
        "numpy>=1.26",
        "opencv-python-headless>=4.8",
        "rosbags>=0.11.9,<0.12",
        "onnx>=1.16",
        "onnxruntime>=1.20",
        "openvino>=2025.0; platform_machine == 'x86_64'",
        "av>=14",
        "pillow>=10.1",
        "rich>=13",
        "typer>=0.15",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "platformdirs>=4",
        "protobuf>=4",
        "threadpoolctl>=3",
        "ruamel.yaml>=0.17",
        "backports.zstd>=1.0; python_version < '3.14'",
    ],
    extras_require={
        "ros": [
            f"ros-jazzy-rclpy=={RCLPY}",
            f"ros-rclpy[fastrtps]=={RCLPY}",
            *(
                f"ros-jazzy-{name}=={INTERFACES}"
                for name in (
                    "sensor-msgs", "std-msgs", "std-srvs", "geometry-msgs", "trajectory-msgs", "diagnostic-msgs",
                    "nav-msgs", "visualization-msgs",
                )
            ),
        ],
        "train": ["torch==2.13.0", "safetensors>=0.4", "onnxscript>=0.5", "onnx-ir>=0.1.16", "huggingface-hub>=0.30"],
        "quantize": ["nncf>=3.0"],
        "sim": ["mujoco>=3.2"],
        "tensorrt": ["cuda-bindings>=12.6", "filelock>=3.13", TENSORRT_RTX],
        "test": [
            "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "transformers>=5",
            "rosbags-image>=0.10.4,<0.11", "colcon-common-extensions>=0.3", "setuptools>=70.1",
            "ruff==0.17.6", "mypy==2.4.1", "nncf>=3.0",
            "cuda-bindings>=12.6", "filelock>=3.13", TENSORRT_RTX,
        ],
    },
    zip_safe=False,
    entry_points={
        "console_scripts": [
            "deeprob = deeprob_perception.cli:main",
            "segmentation = deeprob_perception.nodes.segmentation:main",
            "tracking = deeprob_perception.nodes.tracking:main",
            "policy = deeprob_perception.nodes.policy:main",
            "target = deeprob_perception.nodes.target:main",
            "robot_cell = deeprob_perception.nodes.robot_cell:main",
        ]
    },
)
