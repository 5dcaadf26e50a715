"""Formatting of numbers and of untrusted text, such as file names."""

from __future__ import annotations

import unicodedata


def percent(share: float, digits: int = 1) -> str:
    """A share in percent. Only exact values are shown as 100 % and 0 %.

    Example:
        >>> percent(0.5), percent(0.99999), percent(1.0), percent(0.00001)
        ('50.0 %', '99.9 %', '100 %', '0.1 %')
    """
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    least = 10.0**-digits
    return f"{min(max(100 * share, least), 100 - least):.{digits}f} %"


def duration(seconds: float) -> str:
    """A duration in readable units.

    Example:
        >>> duration(7.25), duration(100), duration(7300)
        ('7.2 s', '1 min 40 s', '2 h 1 min')
    """
    if seconds < 60:
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
