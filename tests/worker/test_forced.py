"""Forced answers: the same numbers from both of vLLM's kinds of logits processors, and as a sum by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_defensive.worker.forced import ARGUMENT, FORCED

ANSWER = [2, 0]
FULL = torch.tensor([[0.0, 1.0, 2.0], [1.0, float("-inf"), 0.5]])
OTHER = torch.tensor([[0.5, 1.0, 0.0], [1.0, float("-inf"), 2.5]])


def params(**names: Any) -> Any:
    return SimpleNamespace(extra_args={ARGUMENT: {**names, "tokens": ANSWER}} if names else None)


class OnCPU:
    """The processor, with one request in row 1 of two; row 0 is somebody else's."""

    def __init__(self) -> None:
        from vllm_defensive.worker.cpu.forced import ForcedAnswers

        self._processor = ForcedAnswers(None, torch.device("cpu"), False)

    def begin(self, own: Any) -> None:
        self._output: list[int] = []
        added = [(0, params(), None, []), (1, own, None, self._output)]
        self._processor.update_state(SimpleNamespace(added=added, removed=[], moved=[]))

    def apply(self, logits: torch.Tensor, position: int) -> torch.Tensor:
        self._output[:] = ANSWER[: max(position, 0)]
        return self._processor.apply(logits)


class OnGPU:
    """Slots 7 and 3 of the runner; a prompt of five tokens."""

    def __init__(self) -> None:
        pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor")
        from vllm_defensive.worker.cuda.forced import ForcedAnswers

        self._processor = ForcedAnswers(None, SimpleNamespace(prompt_len=SimpleNamespace(np=[5] * 8)))

    def begin(self, own: Any) -> None:
        assert not self._processor.add_request(7, params())
        assert self._processor.add_request(3, own)

    def apply(self, logits: torch.Tensor, position: int) -> torch.Tensor:
        context = SimpleNamespace(idx_mapping_np=[7, 3], seq_lens_upper_bound_np=[9, 5 + position])
        return self._processor.apply(logits, context)


@pytest.mark.parametrize("device", [OnCPU, OnGPU])
def test_an_answer_is_forced_and_compared_with_the_one_over_the_full_cache(device: type) -> None:
    runner: Any = device()
    for rows, names in ((FULL, {"of": "a"}), (OTHER, {"of": "a", "against": "b"})):
        runner.begin(params(**names))
        for position in (0, 0, 1):  # the first row comes again, as it does of a prompt's chunks
            logits = torch.stack([torch.ones(3), rows[position]])
            found = runner.apply(logits, position)
            assert found[0].tolist() == [1.0, 1.0, 1.0], "a row of another request"
            assert found[1].argmax() == ANSWER[position] and found[1].exp().sum() == 1
        behind = torch.stack([torch.ones(3), rows[0]])
        assert runner.apply(behind.clone(), len(ANSWER)).tolist() == behind.tolist(), "behind the answer"
    taken = FORCED.take()
    assert taken == {"b": pytest.approx([by_hand(0), by_hand(1)], rel=1e-5)}
    assert FORCED.take() == {} and not FORCED.rows


def by_hand(position: int) -> float:
    """KL(full || other), in nats; what cannot be said at all counts nothing."""
    full, other = (FULL[position].exp().tolist(), OTHER[position].exp().tolist())
    return sum(
        p / sum(full) * math.log((p / sum(full)) / (q / sum(other))) for p, q in zip(full, other, strict=True) if p
    )


def test_what_was_not_kept_is_not_compared_with() -> None:
    runner = OnCPU()
    runner.begin(params(of="nobody", against="b"))
    runner.apply(torch.stack([torch.ones(3), FULL[0]]), 0)
    assert FORCED.take() == {}
