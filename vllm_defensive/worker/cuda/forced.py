"""Forced answers in model runner V2, which GPUs have. Imported by API servers too, which check parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from vllm_defensive.worker.forced import FORCED, Answer, answer_of


class ForcedAnswers(LogitsProcessor):
    """See `worker/forced.py`. Rows of other requests are not touched."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._states = req_states
        self._answers: dict[int, Answer] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        answer = answer_of(sampling_params)
        self._answers.pop(req_idx, None)
        if answer is not None:
            self._answers[req_idx] = answer
        return answer is not None

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        # Without drafts, which the command that forces answers turns off, a request has one row, and lengths are exact.
        for row, (slot, length) in enumerate(zip(ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np, strict=True)):
            if (answer := self._answers.get(int(slot))) is not None:
                FORCED.force(answer, int(length) - int(self._states.prompt_len.np[slot]), logits[row])
        return logits
