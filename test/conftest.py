# SPDX-License-Identifier: Apache-2.0
"""Fixtures that more than one test file uses."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let `-n 2` run all live nodes in one process, for their timing, and each other file in one, for its fixtures.

    xdist's own `--dist loadgroup` (3.8.0) groups nothing under pytest 9.2, and says nothing.
    """
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def group(file: str) -> str:
        return "live nodes" if "pytest.mark.ros" in (config.rootpath / file).read_text() else file

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid.split("::", 1)[0])

    return Grouped(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' folder of real data, robots and reference tensors; it is not part of the project."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the developers' shared data folder beside the checkout, which is absent")
    return SHARED


@pytest.fixture(scope="session")
def tiny_recipe() -> dict:
    """A recipe for the smallest network with the tabletop classes."""
    classes = {
        "background": (0, 0, 0),
        "table": (150, 110, 70),
        "box": (220, 60, 50),
        "ball": (250, 200, 40),
        "cylinder": (60, 160, 230),
        "mug": (170, 80, 200),
        "robot": (90, 200, 110),
    }
    return {
        "task": "segmentation",
        "backbone": "swin-micro",
        "head": "fpn",
        "classes": list(classes),
        "palette": [list(colour) for colour in classes.values()],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }


@pytest.fixture(scope="session")
def tiny_net(tiny_recipe):
    """A network with random weights whose labels vary over any picture: logits balanced on smooth colour blobs."""
    torch = pytest.importorskip("torch", reason="the test model is made by torch's exporter (extra `train`)")
    from deeprob_perception.nets import segmenter

    random_state = torch.random.get_rng_state()
    torch.manual_seed(7)
    net = segmenter.build(tiny_recipe).eval()
    blobs = torch.nn.functional.interpolate(torch.randn(4, 3, 6, 8) * 1.5, size=(96, 128), mode="bicubic")
    with torch.no_grad():
        logits = net(blobs)
        mean, std = logits.mean((0, 2, 3)), logits.std((0, 2, 3))
        net.head.classify.weight /= std[:, None, None, None] / 3
        net.head.classify.bias.copy_(-mean / std * 3)
    torch.random.set_rng_state(random_state)
    return net


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_net, tiny_recipe) -> Path:
    """An exported model with random weights, tabletop classes and a 96 x 128 (height x width) input."""
    from deeprob_perception.export import export_segmentation

    path = tmp_path_factory.mktemp("models") / "tiny.onnx"
    return export_segmentation(tiny_net, tiny_recipe, path, 96, 128, {"name": "tiny", "licence": "Apache-2.0"})


@pytest.fixture(scope="session")
def upernet_model(tmp_path_factory, tiny_recipe) -> Path:
    """Swin-T with UPerNet as published, random weights, of a size that neither window nor stride divides."""
    torch = pytest.importorskip("torch", reason="the test model is made by torch's exporter (extra `train`)")
    from deeprob_perception.export import export_segmentation
    from deeprob_perception.nets import segmenter

    random_state = torch.random.get_rng_state()
    torch.manual_seed(3)
    recipe = {**tiny_recipe, "backbone": "swin-tiny", "head": "upernet", "head_channels": 64}
    net = segmenter.build(recipe).eval()
    with torch.no_grad():
        # Logits balanced on smooth blobs, so that labels vary.
        logits = net(torch.nn.functional.interpolate(torch.randn(2, 3, 6, 8) * 1.5, size=(90, 130), mode="bicubic"))
        mean, std = logits.mean((0, 2, 3)), logits.std((0, 2, 3))
        net.head.classify.weight /= std[:, None, None, None] / 3
        net.head.classify.bias.copy_(-mean / std * 3)
    torch.random.set_rng_state(random_state)
    path = tmp_path_factory.mktemp("models") / "upernet.onnx"
    return export_segmentation(net, recipe, path, 90, 130, {"name": "upernet"})
