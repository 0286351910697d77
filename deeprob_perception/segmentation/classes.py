# SPDX-License-Identifier: Apache-2.0
"""Class names and colours: from a data set's `classes.json`, or one of the sets that this project's models use."""

import json
from dataclasses import dataclass
from pathlib import Path

from deeprob_perception.errors import DataError


@dataclass(frozen=True)
class ClassSet:
    """Names in id order and their colours (RGB, 0..255)."""

    names: list[str]
    palette: list[list[int]]


CLASS_SETS = {
    # CamVid in SegNet's eleven classes, and SegNet's colours (Badrinarayanan et al., TPAMI 2017).
    "street": ClassSet(
        ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"],
        [
            [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0],
            [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192],
        ],
    ),
    # The rendered table of `deeprob sim`.
    "tabletop": ClassSet(
        ["background", "table", "box", "ball", "cylinder", "mug", "robot"],
        [[70, 70, 70], [190, 150, 100], [230, 60, 60], [250, 200, 40], [60, 170, 230], [170, 80, 220], [70, 200, 110]],
    ),
}  # fmt: skip


def class_set(data: Path, name_or_file: str | None = None) -> ClassSet:
    """Return the classes of a data set: those named, else those of its `classes.json`.

    :param name_or_file: a key of `CLASS_SETS`, or a JSON file `{"names": [...], "palette": [[r, g, b], ...]}`.
    :raises DataError: when there is neither, or the file is not of that form.
    """
    if name_or_file in CLASS_SETS:
        return CLASS_SETS[name_or_file]
    path = Path(name_or_file) if name_or_file else data / "classes.json"
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; give the class names in it, or name a set of classes: {', '.join(CLASS_SETS)}"
        )
    try:
        content = json.loads(path.read_text())
        names = [str(name) for name in content["names"]]
        palette = [[int(v) for v in colour] for colour in content["palette"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{path}: want {{"names": [...], "palette": [[r, g, b], ...]}}: {error!r}') from error
    if not 0 < len(names) <= 255 or len(names) != len(palette) or any(len(colour) != 3 for colour in palette):
        raise DataError(f"{path}: {len(names)} names and {len(palette)} colours; want 1 to 255 names and one RGB colour each")
    return ClassSet(names, palette)
