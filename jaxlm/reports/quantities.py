"""Numbers with units, as people read them."""

from __future__ import annotations

import math

_SIGNS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def digits(number: float) -> str:
    """A number in three digits, or all those before the point."""
    return f"{number:.3g}" if abs(number) < 999.5 else f"{number:,.0f}"


def power(number: float) -> str:
    """A number in three digits, a large or a small one with its power of ten."""
    if number == 0 or 1e-3 <= abs(number) < 1e6:
        return digits(number)
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{mantissa} × {_ten(int(exponent))}"


def size(number: float) -> str:
    """A number of bytes."""
    divisor, unit = _unit(number, (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
    return f"{digits(number / divisor)} {unit}"


def count(number: float) -> str:
    """A number of things: all its digits below 10,000, else the first three."""
    if number < 1e4:
        return f"{number:,.0f}"
    divisor, unit = _unit(number, (1e9, "G"), (1e6, "M"), (1e3, "k"))
    return f"{digits(number / divisor)} {unit}"


def amount(unit: str, number: float) -> str:
    """A number of `bytes`, `flops` or `seconds`."""
    if unit == "bytes":
        return size(number)
    return f"{power(number)} FLOPs" if unit == "flops" else f"{number:,.0f} s"


def axis_scale(unit: str, largest: float) -> tuple[float, str]:
    """By what the numbers on an axis of `bytes`, `flops` or `seconds` are divided, and its label."""
    if unit == "flops":
        exponent = math.floor(math.log10(largest)) if largest > 0 else 0
        return 10.0**exponent, f"training FLOPs (× {_ten(exponent)})"
    if unit == "seconds":
        divisor, name = _unit(largest / 2, (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
        return divisor, f"training time ({name})"
    divisor, name = _unit(largest, (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
    return divisor, f"source bytes seen ({name})"


def _unit(number: float, *units: tuple[float, str]) -> tuple[float, str]:
    """The first unit, from the largest down, of which there is at least one; the last if there is none."""
    return next((unit for unit in units if number >= unit[0]), units[-1])


def _ten(exponent: int) -> str:
    return f"10{str(exponent).translate(_SIGNS)}"
