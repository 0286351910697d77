# SPDX-License-Identifier: Apache-2.0
"""Import every command group, so that each registers itself on `app`."""

from deeprob_perception.cli import (  # noqa: F401
    bag,
    bench,
    build,
    demo,
    doctor,
    evaluate,
    export,
    models,
    play,
    quantize,
    replay,
    sim,
    train,
)
