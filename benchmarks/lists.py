"""Lists in one word of a command line, separated by commas: types for `argparse`."""

from __future__ import annotations


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]
