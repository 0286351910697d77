# SPDX-License-Identifier: Apache-2.0
"""Where the files that ship with the package lie: models, config, launch."""

import sys
from functools import cache
from pathlib import Path

PACKAGE = "deeprob_perception"


@cache
def share_dir() -> Path:
    """Return the folder that holds `models/`, `config/` and `launch/`.

    A source checkout (or `pip install -e`) wins, since that is what its owner edits; then the ament index
    (`colcon build`), then `<prefix>/share` (`pip install`).
    """
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "package.xml").is_file() and (checkout / "models").is_dir():
        return checkout
    try:
        from ament_index_python.packages import get_package_share_directory

        return Path(get_package_share_directory(PACKAGE))
    except (ImportError, LookupError, OSError):  # OSError: no AMENT_PREFIX_PATH, as with ROS from PyPI
        pass
    for parent in Path(__file__).resolve().parents:
        candidate = parent / "share" / PACKAGE
        if (candidate / "models").is_dir():
            return candidate
    return Path(sys.prefix) / "share" / PACKAGE
