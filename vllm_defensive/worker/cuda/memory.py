"""What eviction takes beside the KV cache. vLLM's profile run measures everything else, but has no prompt to evict."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from vllm.utils.math_utils import cdiv

from vllm_defensive.worker.cuda.launches import SCORES_AT_A_TIME
from vllm_defensive.worker.cuda.runtime import widest_launch
from vllm_defensive.worker.projections import Projections
from vllm_defensive_kernels import reconstruction

SCORE_COPIES = 8  # of all layers' scores: weighed, stacked, sorted (with int64 indices), and what sorting takes
# Of those of the layers that are weighed in one go: temporaries, those of another sort among them, and foretold ones.
SETTLE_COPIES = 17
AGAIN_COPIES = 3  # more of all layers' scores, where they last: as they were made, in places, and on the way there
KEPT_BYTES = 8  # of a packed token of each layer and head, where it is chosen from again: position and score


@dataclass(frozen=True)
class Model:
    """The layers that are evicted, as one rank has them. dtype: of queries. page_tokens: `N`. num_readers: layers that
    read their caches; 0: each one its own."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    page_tokens: int
    num_readers: int = 0


@dataclass(frozen=True)
class BesideCache:
    """Bytes at most, by what holds them.

    decode: partial results of the widest launch. state: what each request keeps, and the rows' slots. windows: queries
    of all windows that are kept at a time. projections: what `Projections` holds once every policy has been seen.
    scores: weighing the longest prompt, or request, and taking the projections apart while at it.
    echoes: peaks of the longest prompt, one at a time, and what a launch takes; nothing without a second look.
    """

    decode: int
    state: int
    windows: int
    projections: int
    scores: int
    echoes: int

    @property
    def total(self) -> int:
        return sum(astuple(self))

    @classmethod
    def of(
        cls,
        model: Model,
        projections: Projections,
        *,
        window: int,
        max_tokens: int,
        max_requests: int,
        prompts_at_once: int,
        echoes_at_once: int,
        classes: int = 1,
        answers: bool = False,
    ) -> BesideCache:
        """By count of the tensors. max_tokens: of a prompt. prompts_at_once: whose windows are kept at a time.
        echoes_at_once: tokens of an echo in one step; 0: there are none. classes: of pages, that are served. answers:
        whether these are evicted; what is kept of packed tokens then is not counted (`kept_share`)."""
        rows, splits = widest_launch(max_requests, model.num_query_heads, model.num_kv_heads)
        heads, layer = model.num_layers * model.num_kv_heads, model.num_kv_heads * max_tokens
        readers = model.num_readers or model.num_layers
        at_a_time = min(readers * layer, max(SCORES_AT_A_TIME, layer))
        queries = readers * model.num_query_heads * model.head_size * model.dtype.itemsize
        lasting, passing = projections.bytes_at_most()
        copies = SCORE_COPIES + AGAIN_COPIES * answers
        launch = reconstruction.bytes_at_most(echoes_at_once, model.num_query_heads)
        return cls(
            decode=rows * splits * model.num_query_heads * (model.head_size + 1) * 4,
            # Fresh blocks, heads' first pages of each class, shared blocks, growth and row of each request, in int32.
            state=max_requests * (cdiv(max_tokens, model.page_tokens) + classes * heads + 1 + 3) * 4,
            windows=prompts_at_once * window * queries,
            projections=lasting,
            scores=(copies * readers * layer + SETTLE_COPIES * at_a_time) * 4 + passing,
            echoes=0 if not echoes_at_once else heads * max_tokens * 4 + launch,
        )


def kept_share(head_size: int, number_bytes: int) -> float:
    """Bytes at most of what is known of packed tokens that are chosen from again, beside each byte of the KV cache: of
    any token there. number_bytes: of one of its keys' and values'."""
    return KEPT_BYTES / (2 * head_size * number_bytes)
