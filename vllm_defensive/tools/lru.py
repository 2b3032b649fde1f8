"""How often a question finds its document in a cache that lets the one go that was asked about longest ago.

Questions are drawn independently, and a document is as popular at any time as at any other. Che's approximation for
those (H. Che, Y. Tung, Z. Wang, "Hierarchical Web Caching Systems: Modeling, Design and Experimental Results", IEEE
JSAC 20(7), 2002, https://doi.org/10.1109/JSAC.2002.801752) says: a document is there if it was asked about within the
last `t` questions, with one `t` for all, such that on average as many documents are there as the cache holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_ROUNDS = 100  # Newton's method needs some ten
_CLOSE = 1e-9


def zipf(count: int, exponent: float) -> list[float]:
    """Shares of questions that are about each of so many documents: the i-th is as popular as `1 / i ** exponent`."""
    weights = [rank**-exponent for rank in range(1, count + 1)]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def hit_rate(shares: Sequence[float], held: float) -> float:
    """Share of the questions whose document is there, of a cache that holds so many documents, in the long run.

    shares: of the questions that are about each document.
    """
    if held >= len(shares):
        return 1.0
    # sum(1 - exp(-p * t)) = held: the left side is concave and at most t, so that Newton's steps from t = held never
    # go too far.
    t = held
    for _ in range(_ROUNDS):
        absent = [math.exp(-share * t) for share in shares]
        slope = math.fsum(map(float.__mul__, shares, absent))
        step = (held - len(shares) + math.fsum(absent)) / slope
        t += step
        if step <= _CLOSE * t:
            break
    return math.fsum(share * -math.expm1(-share * t) for share in shares)
