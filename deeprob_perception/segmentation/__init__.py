# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation on arrays: `Segmenter(engine)(bgr) -> Segmentation`."""

from deeprob_perception.segmentation.segmenter import Segmentation, Segmenter

__all__ = ["Segmentation", "Segmenter"]
