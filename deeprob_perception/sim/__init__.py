# SPDX-License-Identifier: Apache-2.0
"""The simulated table top: random scenes, their rendering, exact ground truth. Needs the extra `sim` (MuJoCo)."""
