# SPDX-License-Identifier: Apache-2.0
"""Features as colours: their first three principal components, with a basis that does not jump from frame to frame."""

import numpy as np

from deeprob_perception.tracking.blas import one_thread

RENEWED = 0.05  # share of mean and covariance that a frame renews
EVERY = 15  # frames between two bases: solving for one costs milliseconds


class FeatureColours:
    """Colours of features over a video.

    The covariance is a moving average; a new basis is turned within its three components to be as near to the old one as
    can be (orthogonal Procrustes; Schönemann, 1966), so that what was green stays green.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._frames = 0
        self._mean = np.zeros(0, np.float32)
        self._covariance = np.zeros((0, 0), np.float32)
        self._basis = np.zeros((0, 3), np.float32)
        self._low, self._high = np.zeros(3, np.float32), np.ones(3, np.float32)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return colours uint8 `[h, w, 3]` of features float32 `[h, w, C]`."""
        with one_thread():
            return self._colours(features)

    def _colours(self, features: np.ndarray) -> np.ndarray:
        flat = features.reshape(-1, features.shape[-1])
        mean = flat.mean(0)
        centred = flat - mean
        covariance = centred.T @ centred / len(flat)
        if not self._frames or len(mean) != len(self._mean):
            self._mean, self._covariance = mean, covariance
            self._basis = np.linalg.eigh(covariance)[1][:, :-4:-1].astype(np.float32)
            self._low, self._high = self._range(flat)
        else:
            self._mean = self._mean + RENEWED * (mean - self._mean)
            self._covariance = self._covariance + RENEWED * (covariance - self._covariance)
            if self._frames % EVERY == 0:
                fresh = np.linalg.eigh(self._covariance)[1][:, :-4:-1].astype(np.float32)
                u, _, v = np.linalg.svd(fresh.T @ self._basis)
                self._basis = fresh @ (u @ v)
            low, high = self._range(flat)
            self._low, self._high = self._low + RENEWED * (low - self._low), self._high + RENEWED * (high - self._high)
        self._frames += 1
        shares = ((flat - self._mean) @ self._basis - self._low) / np.maximum(self._high - self._low, 1e-6)
        return (shares.clip(0, 1) * 255).astype(np.uint8).reshape(*features.shape[:2], 3)

    def _range(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.percentile((flat - self._mean) @ self._basis, (2, 98), axis=0)
        return low.astype(np.float32), high.astype(np.float32)
