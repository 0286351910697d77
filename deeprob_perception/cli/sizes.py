# SPDX-License-Identifier: Apache-2.0
"""Sizes as users write them: `HEIGHTxWIDTH` of a network's input, `WIDTHxHEIGHT` of a camera's pictures."""

import re

from deeprob_perception.errors import PerceptionError


def sides(text: str, option: str, form: str, least: int = 1, square: bool = False) -> tuple[int, int]:
    """Return both numbers of a text such as `240x320`, in its own order, px.

    :param form: what the two are, for the error: `HEIGHTxWIDTH` or `WIDTHxHEIGHT`.
    :param least: the smallest side that is allowed. square: one number stands for both.
    :raises PerceptionError: names the option and what it wants.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower()) or (square and re.fullmatch(r"(\d+)", text))
    if match and min(found := [int(number) for number in match.groups()]) >= least:
        return found[0], found[-1]
    example = "640x480" if form.startswith("WIDTH") else "480x640"
    raise PerceptionError(f"{option} {text}: want {form}{' or one side' if square else ''}, such as {example}"
                          f"{' or 256' if square else ''}, at least {least} pixels a side")
