# SPDX-License-Identifier: Apache-2.0
"""Learning rates over a training."""

import math


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Return the factor on the learning rate: a linear rise, then half a cosine down to zero."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
