# SPDX-License-Identifier: Apache-2.0
"""Tracks laid over the camera image: objects in colours, points with the trail of where they came from."""

from collections import deque

import cv2
import numpy as np

from deeprob_perception.tracking.tracker import Tracks


def colour_of(number: int) -> tuple[int, int, int]:
    """Return a colour, BGR, that differs from those of the numbers near: hues at the golden angle."""
    hue = np.array([[[int(number * 137.508 / 2) % 180, 220, 255]]], np.uint8)  # OpenCV's hue is half the degrees
    blue, green, red = cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0].tolist()
    return blue, green, red


class TrackOverlay:
    """Draws tracks; remembers where points were.

    `trail`: how many frames back.
    """

    def __init__(self, trail: int = 15):
        self.trail = trail
        self._ways: dict[int, deque[tuple[int, int]]] = {}

    def reset(self) -> None:
        self._ways = {}

    def remember(self, tracks: Tracks) -> None:
        """Note where visible points are, in every frame, drawn or not."""
        there = set()
        for number, (x, y), visible in zip(tracks.ids.tolist(), tracks.points.tolist(), tracks.visible.tolist(), strict=True):
            there.add(number)
            if visible:
                way = self._ways.setdefault(number, deque(maxlen=max(1, self.trail)))
                if way.maxlen != max(1, self.trail):
                    way = self._ways[number] = deque(way, max(1, self.trail))
                way.append((round(x * 8), round(y * 8)))
        for number in self._ways.keys() - there:
            del self._ways[number]

    def draw(self, bgr: np.ndarray, tracks: Tracks, alpha: float = 0.5) -> np.ndarray:
        """Return a new image, uint8 `[H, W, 3]` BGR.

        :param alpha: opacity of the objects' colours, 0 to 1.
        """
        drawn = np.array(bgr)
        if tracks.mask is not None:
            for number in np.unique(tracks.mask):
                if number:
                    where = tracks.mask == number
                    colour = np.array(colour_of(int(number)), np.float32)
                    drawn[where] = (drawn[where] * (1 - alpha) + colour * alpha).astype(np.uint8)
                    outline, _ = cv2.findContours(where.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
                    cv2.drawContours(drawn, outline, -1, colour_of(int(number)), 1, cv2.LINE_AA)
        for number, visible in zip(tracks.ids.tolist(), tracks.visible.tolist(), strict=True):
            way = self._ways.get(number)
            if not visible or not way:
                continue
            line = colour_of(number)
            if self.trail > 1 and len(way) > 1:
                cv2.polylines(drawn, [np.array(way, np.int32)], False, line, 1, cv2.LINE_AA, shift=3)
            cv2.circle(drawn, way[-1], 18, line, -1, cv2.LINE_AA, shift=3)
        return drawn
