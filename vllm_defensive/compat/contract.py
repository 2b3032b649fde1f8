"""Which versions of vLLM are supported, and whether the one that is here keeps what `names.py` leans on.

An overridden method that vLLM renames is otherwise never called, and a private name that is gone shows when the first
long prompt comes. So before anything is switched on, each name is looked at: with `inspect` where its module has been
imported anyway, else in its source, because the imports of a worker take seconds and have no place in an API server.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import vllm_defensive
from vllm_defensive.compat.names import BY_SIDE
from vllm_defensive.compat.sources import Absent, Found, Sources

SUPPORTED = ((0, 32), (0, 33))  # and any patch release, pre-release and build of these
_SHOWN = 3  # mismatches, in a message of one line


def installed() -> str:
    """vLLM's version. The package's own word: the CPU build is installed as another distribution."""
    import vllm

    return str(vllm.__version__)


def is_supported(version: str) -> bool:
    """Whether a version such as `0.32.0+cpu` or `0.33.1.dev4` is one that we know. Costs nothing."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) in SUPPORTED


@functools.cache
def require(*sides: str) -> None:
    """Raises ValueError, one line, unless this process's vLLM is a supported version and keeps the contract.

    sides: keys of `names.BY_SIDE`. What was found in order is not looked at again.
    """
    mismatches = check(sides)
    if mismatches or not is_supported(installed()):
        raise ValueError(refusal(mismatches))


def refusal(mismatches: Sequence[str] = ()) -> str:
    """One line for users whose vLLM we do not run on."""
    known = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    more = f" and {len(mismatches) - _SHOWN} more" if len(mismatches) > _SHOWN else ""
    differs = f"; differs: {', '.join(mismatches[:_SHOWN])}{more}" if mismatches else ""
    return (
        f"vllm={installed()}: KV eviction of vllm-defensive {vllm_defensive.__version__} supports vLLM {known}"
        f"{differs}; install one of these, or a vllm-defensive that knows this one"
    )


def worker_sides() -> tuple[str, ...]:
    """What a worker on this platform leans on."""
    from vllm.platforms import current_platform

    return ("worker", "cuda") if current_platform.is_cuda() else ("worker", "cpu")


def all_sides() -> tuple[str, ...]:
    """What the processes of an engine on this platform lean on."""
    return "serving", "engine", *worker_sides()


def check(sides: Iterable[str], folder: Path | None = None) -> list[str]:
    """What does not match, a line each: the name, and what is there instead.

    folder: of another vLLM (the package itself), whose sources are read; None: the one of this process.
    """
    sources = Sources(folder or Path(sys.modules["vllm"].__path__[0]))
    lines = []
    for side in sides:
        for module, names in BY_SIDE[side].items():
            for name, wanted in names.items():
                wrong = _compare(sources, module, name, wanted, live=folder is None)
                lines += [f"{module}.{name} {wrong}"] if wrong else []
    return lines


def _compare(sources: Sources, module: str, name: str, wanted: str | None, live: bool) -> str:
    """What is wrong with one name, or nothing."""
    try:
        found = _find(sources, module, name, wanted, live)
    except Absent:
        return "is gone"
    if wanted is None or found is None:
        return "" if wanted is None or wanted == "..." else "is not a function"
    return "" if matches(found, wanted) else f"takes ({', '.join(found)}), not ({wanted})"


def _find(sources: Sources, module: str, name: str, wanted: str | None, live: bool) -> Found:
    imported = sys.modules.get(module) if live else None
    if imported is None:
        return sources.find(module, name) if sources else _anything(wanted)
    owner: Any = imported
    for part in name.split("."):
        if not hasattr(owner, part):
            if wanted is not None or not isinstance(owner, type):
                raise Absent
            return sources.find(module, name) if sources else None  # what methods set, if it can be read
        owner = getattr(owner, part)
    return _signature(owner) if wanted is not None else None


def _anything(wanted: str | None) -> Found:
    """A build without sources is judged by what is imported."""
    return None if wanted is None else tuple(wanted.replace("..., ", "").replace(", ...", "").split(", "))


def _signature(function: Any) -> Found:
    if not callable(function):
        return None
    kinds: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    names = [kinds.get(p.kind, "") + p.name for p in inspect.signature(function).parameters.values()]
    return tuple(names[1:] if names[:1] in (["self"], ["cls"]) else names)


def matches(found: tuple[str, ...], wanted: str) -> bool:
    """Whether parameters are those of a row of `names.py`."""
    first, _, others = wanted.partition("...")
    leading = tuple(name for name in first.split(", ") if name)
    if "..." not in wanted:
        return found == leading
    return found[: len(leading)] == leading and set(others.strip(", ").split(", ")) - {""} <= set(found)
