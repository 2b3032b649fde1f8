"""The registry of aggregates: from the name in a policy's row to the function that scores a layer, and what it reads.

A function is `(policy, layer) -> fp32 [H, T]`, of the tokens before the window, larger is kept (`scores/`). `layer.py`
has what it is given; `weighing.py` what is made of its result for all alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Reads = Literal["nothing", "keys", "queries", "mass", "echo"]
Values = Literal["none", "scored", "all"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Aggregate:
    """How one layer is scored."""

    score: Callable[..., Any]
    reads: Reads
    """The keys; the window's queries and the keys; the accumulated attention of all queries; or that of a second pass
    over the prompt."""
    values: Values
    """Values that it reads whatever weighs them: those of tokens up for eviction, or of all."""
    weighs: bool
    """Whether it multiplies by the value weight itself; else that is done to its result."""
    gaps: bool
    """Whether it looks at what is still there of a prompt (`Layer.there_HS`), so that it can score again."""


AGGREGATES: dict[str, Aggregate] = {}


def aggregate(
    name: str, *, reads: Reads = "queries", values: Values = "none", weighs: bool = False, gaps: bool = False
) -> Callable[[Function], Function]:
    """Enter the decorated function under `name`."""
    assert name not in AGGREGATES, f"two aggregates are called {name}"

    def enter(function: Function) -> Function:
        AGGREGATES[name] = Aggregate(function, reads, values, weighs, gaps)
        return function

    return enter
