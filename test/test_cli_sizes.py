# SPDX-License-Identifier: Apache-2.0
"""Sizes on the command line: one reader for all commands, each with its own order and limits."""

import pytest

from deeprob_perception.cli.sizes import sides
from deeprob_perception.errors import PerceptionError


@pytest.mark.parametrize(("text", "square", "expected"), [
    ("240x320", False, (240, 320)), ("240X320", True, (240, 320)), ("256", True, (256, 256)), ("32x32", False, (32, 32)),
])  # fmt: skip
def test_both_numbers_come_in_their_own_order(text: str, square: bool, expected: tuple[int, int]) -> None:
    assert sides(text, "--crop", "HEIGHTxWIDTH", least=32, square=square) == expected


@pytest.mark.parametrize("text", ["240x", "x240", "16", "16x320", "axb", "1x2x3", "-32x64", "", "240 x 320"])
@pytest.mark.parametrize("square", [False, True])
def test_what_is_no_size_is_told_with_the_option_and_its_form(text: str, square: bool) -> None:
    with pytest.raises(PerceptionError, match=f"--crop {text}: want HEIGHTxWIDTH.*at least 32 pixels"):
        sides(text, "--crop", "HEIGHTxWIDTH", least=32, square=square)


def test_one_side_is_enough_only_where_it_is_said() -> None:
    with pytest.raises(PerceptionError, match="want WIDTHxHEIGHT, such as 640x480"):
        sides("256", "--size", "WIDTHxHEIGHT")
