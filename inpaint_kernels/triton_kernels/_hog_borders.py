"""Borders between the bins of hog, as unit vectors, and by how much scikit-image's rounded angles miss them."""

from __future__ import annotations

import functools
import math
import struct
from decimal import Decimal, localcontext
from typing import NamedTuple

DIGITS = 60
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")


class Border(NamedTuple):
    """A border at an angle of less than 90 degrees, and its mirror image at 180 degrees minus that.

    Attributes:
        cosine, sine: rounded to the arithmetic's type; equal ones (45 degrees) are equal here.
        cosine_low, sine_low: what rounding took from them.
        early, early_turned: radians before the border from which on scikit-image counts an angle to the next bin,
            because it rounds angles to float64: for gradients that point down, and for those that are turned around.
        early_mirrored, early_mirrored_turned: the same before the mirror image.
    """

    cosine: float
    sine: float
    cosine_low: float
    sine_low: float
    early: float
    early_turned: float
    early_mirrored: float
    early_mirrored_turned: float


@functools.cache
def borders(orientations: int, single: bool) -> tuple[Border, ...]:
    """Those below 90 degrees between the bins of 180 / n degrees, for gradients in float32 (``single``) or float64."""
    with localcontext() as context:
        context.prec = DIGITS
        return tuple(_border(i, orientations, single) for i in range(1, (orientations + 1) // 2))


def _border(number: int, orientations: int, single: bool) -> Border:
    angle, mirrored = PI * number / orientations, orientations - number
    (cosine_high, cosine_low), (sine_high, sine_low) = (
        _split(cosine(direction), single) for direction in (angle, PI / 2 - angle)
    )
    early = (
        float(PI * i / orientations - _first_counted(i, orientations, turned))
        for i in (number, mirrored)
        for turned in (False, True)
    )
    return Border(cosine_high, sine_high, cosine_low, sine_low, *early)


def cosine(angle: Decimal) -> Decimal:
    """Of an angle of at most pi, to DIGITS."""
    # The angle is halved until its series is short, and doubled again: cos 2x = 2 cos^2 x - 1.
    halved, term, total, order = angle / 1024, Decimal(1), Decimal(1), 0
    while abs(term) > Decimal(10) ** -DIGITS:
        order += 2
        term *= -halved * halved / (order * (order - 1))
        total += term
    for _ in range(10):
        total = 2 * total * total - 1
    return total


def _split(value: Decimal, single: bool) -> tuple[float, float]:
    high = _rounded(value, single)
    return high, _rounded(value - Decimal(high), single)


def _rounded(value: Decimal, single: bool) -> float:
    return struct.unpack("f", struct.pack("f", float(value)))[0] if single else float(value)


def _first_counted(border: int, orientations: int, turned: bool) -> Decimal:
    """The least angle in [0, pi) that rounds to one at or above a border; ``turned``: it is first turned by pi.

    Angles are rounded as arctan2 returns them, then to degrees, and negative ones once more when 180 is added.
    """
    at, turn = 180.0 / orientations * border, math.pi if turned else 0.0
    angle = math.pi * border / orientations - turn
    for _ in range(8):  # a few steps are enough to get below it
        angle = math.nextafter(angle, -math.inf)
    while angle * (180.0 / math.pi) % 180 < at:
        angle = math.nextafter(angle, math.inf)
    below = math.nextafter(angle, -math.inf)
    return (Decimal(below) + Decimal(angle)) / 2 + (PI if turned else 0)
