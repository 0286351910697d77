# SPDX-License-Identifier: Apache-2.0
"""ament_python package; the same file makes it pip-installable."""

from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = "deeprob_perception"
JAZZY = [f"ros-jazzy-{name}" for name in (
    "rclpy", "sensor-msgs", "std-msgs", "std-srvs", "geometry-msgs", "trajectory-msgs", "diagnostic-msgs",
    "nav-msgs", "visualization-msgs")]


def share(*folders):
    """Return the data_files rows that install each folder's files into the package's share folder."""
    return [(f"share/{PACKAGE}/{folder}", [f for f in sorted(glob(f"{folder}/*")) if Path(f).is_file()])
            for folder in folders]


setup(
    name=PACKAGE,
    version="0.1.0",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (f"share/{PACKAGE}", ["package.xml"]),
        *share("launch", "config", "models"),
    ],
    python_requires=">=3.10",
    install_requires=[
        "numpy", "opencv-python-headless", "rosbags", "rosbags-image", "onnx", "onnxruntime",
        "openvino; platform_machine == 'x86_64'", "av", "rich", "typer", "matplotlib", "jinja2", "platformdirs", "safetensors",
    ],
    extras_require={
        "ros": [*JAZZY, "ros-rclpy[fastrtps]"],
        "train": ["torch==2.13.0", "onnxscript", "huggingface-hub"],
        "sim": ["mujoco"],
        "test": ["pytest", "pytest-timeout", "hypothesis", "transformers", "ruff", "mypy"],
    },
    zip_safe=False,
    description="ROS 2 perception to action: Swin segmentation, DINO tracking and a GET-style policy",
    license="Apache-2.0",
    entry_points={"console_scripts": [
        "deeprob = deeprob_perception.cli:main",
        "segmentation = deeprob_perception.nodes.segmentation:main",
    ]},
)
