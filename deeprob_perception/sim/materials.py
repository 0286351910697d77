# SPDX-License-Identifier: Apache-2.0
"""The materials of one scene: a fixed number of textures of fixed sizes, with freely drawn contents and tints.

The counts and sizes are constants because a render context is costly to make (0.3 s) and can be kept from scene to
scene only while the textures' layout stays the same; their contents are uploaded anew.
"""

import mujoco
import numpy as np

from deeprob_perception.sim.textures import random_colour, random_texture

FLAT_COUNT, FLAT_SIZE = 8, 256
CUBE_COUNT, CUBE_SIZE = 10, 64


class Materials:
    """Draws materials for one scene specification; names them, so that geoms refer to them."""

    def __init__(self, spec: mujoco.MjSpec, rng: np.random.Generator):
        self._spec, self._rng, self._count, self._next_flat = spec, rng, 0, 0
        # Most rooms are calm, as people's are; a few have every pattern in full contrast.
        self._busy = float(rng.beta(1.0, 3.0))
        for index in range(FLAT_COUNT):
            texture = spec.add_texture(name=f"flat{index}", type=mujoco.mjtTexture.mjTEXTURE_2D,
                                       width=FLAT_SIZE, height=FLAT_SIZE, nchannel=3)
            texture.data = random_texture(rng, FLAT_SIZE, self._contrast()).tobytes()
        for index in range(CUBE_COUNT):
            texture = spec.add_texture(name=f"cube{index}", type=mujoco.mjtTexture.mjTEXTURE_CUBE,
                                       width=CUBE_SIZE, height=6 * CUBE_SIZE, nchannel=3)
            # One picture on the six faces: a scene needs variety between objects more than within one.
            texture.data = np.tile(random_texture(rng, CUBE_SIZE, self._contrast()), (6, 1, 1)).tobytes()

    def plain(self, colour: np.ndarray | None = None) -> str:
        """Add an untextured material of the colour given (RGB in 0..1) or a random one; return its name."""
        return self._add(random_colour(self._rng) if colour is None else colour)

    def flat(self, repeats_per_metre: float) -> str:
        """Add a material with a picture laid along the geom's x and y axes; return its name.

        The pictures are taken in turn: a table that looks like the floor around it cannot be told from it.
        """
        material = self._add(self._tint())
        self._spec.material(material).textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = (
            f"flat{self._next_flat % FLAT_COUNT}")
        self._next_flat += 1
        self._spec.material(material).texuniform = True
        self._spec.material(material).texrepeat = [repeats_per_metre, repeats_per_metre]
        return material

    def cube(self) -> str:
        """Add a material whose picture wraps all around an object; return its name."""
        material = self._add(self._tint())
        self._spec.material(material).textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = (
            f"cube{self._rng.integers(CUBE_COUNT)}")
        return material

    def any(self, plain: float = 0.75) -> str:
        """Add an object material: untextured with the probability `plain`, less in a busy room; return its name."""
        return self.plain() if self._rng.random() < plain - 0.3 * self._busy else self.cube()

    def _contrast(self) -> float:
        return min(1.0, self._busy * float(self._rng.uniform(0.3, 2.0)))

    def _tint(self) -> np.ndarray:
        """A tint near white, or now and then any colour, so that few pictures serve for many looks."""
        return 1.0 - self._rng.uniform(0, 0.25, 3) if self._rng.random() < 0.6 else 0.4 + 0.6 * random_colour(self._rng)

    def _add(self, colour: np.ndarray) -> str:
        name = f"material{self._count}"
        self._count += 1
        shiny = self._rng.random() < 0.3
        self._spec.add_material(
            name=name, rgba=[*map(float, colour), 1.0],
            specular=float(self._rng.uniform(0.3, 0.9) if shiny else self._rng.uniform(0, 0.3)),
            shininess=float(self._rng.uniform(0.2, 0.9)))
        return name
