"""Answers forced token by token inside the engine, and what the model would have said at each of them.

A logits processor, vLLM's public hook: it sees the raw logits of every row of a batch. It lives in the engine's
process, so the engine has to be in ours (`VLLM_ENABLE_V1_MULTIPROCESSING=0`); the 49,152 probabilities of a token then
never become Python objects.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from benchmarks.quality.answers import Forced

ARGUMENT = "forced_answer"


PENDING: dict[int, Forced] = {}
"""By the number that a request carries in `extra_args[ARGUMENT]`."""


class ForcedAnswers(LogitsProcessor):
    """Records each forced row and leaves it no choice but its next token. Other rows are not touched."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[Forced, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        def state(params: Any, prompt: Any, output: list[int]) -> tuple[Forced, list[int]] | None:
            number = (params.extra_args or {}).get(ARGUMENT)
            return None if number is None else (PENDING[number], output)

        process_dict_updates(self._rows, batch_update, state)

    def apply(self, logits: Tensor) -> Tensor:
        # What others are compared with comes first: it may be in the same batch.
        for row, (forced, output) in sorted(self._rows.items(), key=lambda item: not item[1][0].keep):
            position = len(output)
            if position < len(forced.tokens) and row < len(logits):
                forced.record(position, logits[row])
                logits[row] = float("-inf")
                logits[row, forced.tokens[position]] = 0.0
        return logits
