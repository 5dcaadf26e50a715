"""Formatting of numbers and of untrusted text, such as file names."""

from __future__ import annotations

import math
import unicodedata


def percent(share: float, digits: int = 1) -> str:
    """A share in percent. Only exact values are shown as 0 % and 100 %.

    Example:
        >>> percent(0.5), percent(1.5), percent(1.0), percent(3.5e-8), percent(0.9999999)
        ('50.0 %', '150.0 %', '100 %', '<0.1 %', '>99.9 %')
    """
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return _bounded(share, f"{100 * share:.{digits}f}", digits)


def probability(share: float) -> str:
    """The probability of a class in percent.

    A softmax is never exactly 0 or 1, also where rounding to 64 bits makes it so.

    Example:
        >>> probability(0.5), probability(1.0), probability(0.0)
        ('50.0 %', '>99.9 %', '<0.1 %')
    """
    return percent(min(max(share, 1e-9), 1 - 1e-9))


def interval(low: float, high: float, digits: int = 1) -> str:
    """A confidence interval of a share in percent, rounded outwards.

    So the rounded interval contains everything that the exact one contains.

    Example:
        >>> interval(0.33333, 0.33341), interval(0, 0.2501), interval(0.34, 1)
        ('33.3 % to 33.4 %', '0 % to 25.1 %', '34.0 % to 100 %')
    """
    factor = 10**digits
    # Rounding errors such as those of 100 * 0.29 must not move a bound to the next digit.
    down = math.floor(100 * factor * low + 1e-9) / factor
    up = math.ceil(100 * factor * high - 1e-9) / factor
    return f"{_bound(low, down, digits)} to {_bound(high, up, digits)}"


def _bound(share: float, rounded: float, digits: int) -> str:
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return _bounded(share, f"{rounded:.{digits}f}", digits)


def _bounded(share: float, text: str, digits: int) -> str:
    """Replace a text that would show a share between 0 and 1 as 0 % or 100 %."""
    least = 10.0**-digits
    if 0 < share < 1 and float(text) == 0:
        text = f"<{least:.{digits}f}"
    elif 0 < share < 1 and float(text) == 100:
        text = f">{100 - least:.{digits}f}"
    return f"{text} %"


def decimal(value: float, digits: int = 4) -> str:
    """A number with a fixed number of decimals. Small ones keep two significant digits.

    Example:
        >>> decimal(0.25), decimal(0.0), decimal(3.5e-8), decimal(-0.00002)
        ('0.2500', '0.0000', '3.5e-08', '-2e-05')
    """
    text = f"{value:.{digits}f}"
    return text if value == 0 or float(text) != 0 else f"{value:.2g}"


def byte_text(count: int) -> str:
    """A number of bytes in a readable unit.

    Example:
        >>> byte_text(999), byte_text(1_240_000)
        ('999 bytes', '1.2 MB')
    """
    if count < 1000:
        return f"{count} bytes"
    size, units = float(count), ["kB", "MB", "GB", "TB"]
    while size >= 999.95 and units:
        size, unit = size / 1000, units.pop(0)
    return f"{size:.1f} {unit}"


def duration(seconds: float) -> str:
    """A duration in readable units.

    Example:
        >>> duration(0.01), duration(7.25), duration(59.97), duration(100), duration(7300)
        ('<0.1 s', '7.2 s', '1 min 0 s', '1 min 40 s', '2 h 1 min')
    """
    if 0 < seconds < 0.05:
        return "<0.1 s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def readable(text: str) -> str:
    """Make an untrusted text, such as a file name, safe to print on one line.

    Control characters (which could control a terminal), characters that change the direction
    of writing, and bytes that are not UTF-8 are escaped.

    Example:
        >>> print(readable("a\\x1b[2J\\n"))
        a\\x1b[2J\\n
    """
    if text.isprintable():  # as are the pictures of a report, which are long
        return text
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    # Control, format (except joiners, which scripts and emoji need), surrogates, separators.
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    if not hidden or character in "\u200c\u200d":
        return character
    return character.encode("unicode_escape").decode("ascii")


def shortened(text: str, most: int) -> str:
    """Shorten a text to ``most`` characters by replacing its middle.

    Example:
        >>> shortened("Chihuahua (short hair)", 11), shortened("tulip", 11)
        ('Chihu…hair)', 'tulip')
    """
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"
