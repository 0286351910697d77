# SPDX-License-Identifier: Apache-2.0
"""One thread for NumPy's products: small ones gain little by a second, which spins while the engine wants the cores.

On two busy cores mask propagation took 490 ms a frame with two threads and 90 ms with one; the features' colours, beside a
segmentation node, took 62 ms with two.
"""

from contextlib import AbstractContextManager
from typing import Any

from threadpoolctl import ThreadpoolController

_BLAS = ThreadpoolController()


def one_thread() -> AbstractContextManager[Any]:
    """Return a context in which the BLAS under NumPy runs on the caller's thread alone."""
    limits: AbstractContextManager[Any] = _BLAS.limit(limits=1, user_api="blas")
    return limits
