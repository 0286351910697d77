# SPDX-License-Identifier: Apache-2.0
"""What a real camera adds to a rendered picture: exposure, white balance, vignetting, blur, noise."""

from dataclasses import dataclass

import cv2
import numpy as np

# Automatic exposure reaches this far; darker or brighter scenes stay so.
_AUTO_GAIN = (0.6, 3.0)


@dataclass(frozen=True)
class Sensor:
    """One camera's settings; `Sensor()` changes nothing."""

    target: float = 0.0  # mean grey level that automatic exposure aims at; 0 for none
    gain: float = 1.0  # exposure, on top of the automatic one
    balance: tuple[float, float, float] = (1.0, 1.0, 1.0)  # white balance gains, B, G, R
    gamma: float = 1.0
    vignette: float = 0.0  # share of light lost in the corners
    blur: float = 0.0  # standard deviation of the defocus, pixels
    motion: tuple[float, float] = (0.0, 0.0)  # length of the motion blur along x and y, pixels
    shot_noise: float = 0.0  # standard deviation at full brightness, grey levels of 255; falls with the root of the light
    read_noise: float = 0.0  # standard deviation everywhere, grey levels

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Sensor":
        """Draw a plausible camera, most of them decent ones."""
        moving = rng.random() < 0.2
        return cls(
            target=float(np.clip(rng.normal(105, 22), 55, 160)),
            gain=float(np.exp(rng.normal(0.0, 0.1))),
            balance=tuple(float(v) for v in np.exp(rng.normal(0, 0.07, 3))),  # type: ignore[arg-type]
            gamma=float(np.exp(rng.normal(0, 0.15))),
            vignette=float(rng.uniform(0, 0.4)),
            blur=float(rng.choice([0.0, rng.uniform(0.4, 0.8), rng.uniform(0.8, 1.4)], p=[0.25, 0.5, 0.25])),
            motion=(float(rng.normal(0, 2.5)), float(rng.normal(0, 2.5))) if moving else (0.0, 0.0),
            shot_noise=float(rng.uniform(0, 9)), read_noise=float(rng.uniform(0, 4)))

    def apply(self, bgr: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return what the sensor makes of a rendered picture, uint8 BGR `[H, W, 3]`."""
        gain = self.gain
        if self.target > 0:
            gain *= float(np.clip(self.target / max(float(bgr.mean()), 1.0), *_AUTO_GAIN))
        levels = np.arange(256, dtype=np.float32) / 255.0
        table = np.stack([np.clip(levels * gain * b, 0, None) ** self.gamma * 255.0 for b in self.balance], axis=-1)
        picture = cv2.LUT(bgr, np.clip(table, 0, 400).astype(np.float32)[None])
        height, width = bgr.shape[:2]
        if self.vignette > 0:
            y, x = np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32)
            picture = picture * (1.0 - np.float32(self.vignette * 0.5) * (y[:, None] ** 2 + x[None] ** 2))[..., None]
        if self.blur > 0:
            picture = cv2.GaussianBlur(picture, (0, 0), self.blur)
        if any(self.motion):
            picture = cv2.filter2D(picture, -1, _streak(*self.motion))
        if self.shot_noise > 0 or self.read_noise > 0:
            variance = np.clip(picture, 0, 255) * np.float32(self.shot_noise**2 / 255.0) + np.float32(self.read_noise**2)
            picture = picture + np.sqrt(variance) * rng.standard_normal(picture.shape, np.float32)
        return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def _streak(dx: float, dy: float) -> np.ndarray:
    """Return a line kernel of the length given, float32 `[n, n]`, its sum 1."""
    reach = int(np.ceil(max(abs(dx), abs(dy)) / 2))
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    for s in np.linspace(-0.5, 0.5, 8 * reach + 1):
        kernel[round(reach + s * dy), round(reach + s * dx)] += 1.0
    return kernel / kernel.sum()
