"""Seeded requests in chunks: what is thrown away is not drawn with their generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_discarded(model_runner: Any) -> Iterator[None]:
    """While a step samples, rows whose chunk does not end their tokens have no generator of their own.

    Why: vLLM samples such rows too, throws the token away, and sets their generators back by an offset, which one on a
    CPU does not have: the engine ends. How: rows without a generator draw with the engine's, so that a request's own
    draws one number a token of its answer, however its tokens came to be computed. Until: vLLM does not draw for them.

    model_runner: vLLM's of version 1. Version 2 draws by seed and position, and is left alone.
    """
    batch = getattr(model_runner, "input_batch", None)
    if batch is None or not batch.generators:
        yield
        return
    discarded = model_runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
    apart = {row: batch.generators.pop(row) for row in discarded if row in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(apart)
