"""Forced answers in the model runner that CPUs have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import LogitsProcessor

from vllm_defensive.worker.forced import FORCED, Answer, answer_of


class ForcedAnswers(LogitsProcessor):
    """See `worker/forced.py`. Rows of other requests are not touched."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[Answer, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        def state(params: Any, prompt: Any, output: list[int]) -> tuple[Answer, list[int]] | None:
            answer = answer_of(params)
            return None if answer is None else (answer, output)

        process_dict_updates(self._rows, batch_update, state)

    def apply(self, logits: Tensor) -> Tensor:
        for row, (answer, output) in self._rows.items():
            if row < len(logits):
                FORCED.force(answer, len(output), logits[row])
        return logits
