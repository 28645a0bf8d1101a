"""Numbers with units, as people read them."""

from __future__ import annotations

import math

_SIGNS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def power(number: float, digits: int = 3) -> str:
    """A number in a few digits, a large or small one with its power of ten."""
    if number == 0 or 1e-3 <= abs(number) < 1e6:
        return f"{number:.{digits}g}" if abs(number) < 10**digits else f"{number:,.0f}"
    mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SIGNS)}"


def scale(unit: str, largest: float) -> tuple[float, str]:
    """By what an axis is divided, and its label."""
    if unit == "flops":
        exponent = math.floor(math.log10(largest)) if largest > 0 else 0
        return 10.0**exponent, f"training FLOPs (× 10{str(exponent).translate(_SIGNS)})"
    if unit == "seconds":
        divisor, name = next(
            pair for pair in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if _fits(pair, largest)
        )
        return divisor, f"training time ({name})"
    divisor, name = next(pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if _fits(pair, largest))
    return divisor, f"source bytes seen ({name})"


def amount(unit: str, value: float) -> str:
    if unit == "bytes":
        divisor, label = scale(unit, value)
        return f"{value / divisor:.3g} {label.rsplit('(')[-1].rstrip(')')}"
    return f"{power(value)} FLOPs" if unit == "flops" else f"{value:,.0f} s"


def _fits(pair: tuple[float, str], largest: float) -> bool:
    return largest >= 2 * pair[0] or pair[0] == 1


def size(number: float) -> str:
    """A number of bytes."""
    for divisor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= divisor:
            return f"{number / divisor:.3g} {unit}" if number < 1000 * divisor else f"{number / divisor:,.0f} {unit}"
    return f"{number:,.0f} B"
