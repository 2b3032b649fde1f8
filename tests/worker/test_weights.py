"""Whatever may change a model's weights makes the worker forget what it derived from them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_defensive.counts import WEIGHT_CALLS
from vllm_defensive.worker.cpu.worker import EvictionCPUWorker
from vllm_defensive.worker.worker import EvictionWorker

BELOW = EvictionCPUWorker.__mro__[EvictionCPUWorker.__mro__.index(EvictionWorker) + 1 :]
FORGETTING = (
    "reload_weights", "update_weights", "finish_weight_update", "reset_weights", "sleep", "wake_up", "apply_model",
)  # fmt: skip
COMING_BACK = ("sleep", "wake_up")  # with the same weights, or with such as one of the others brings
# Looked at: these change no weight of the model, or are followed by one of those above.
HARMLESS = {
    "compute_weight_checksums", "init_weight_transfer_engine", "shutdown_weight_transfer_engine", "start_weight_update",
    "start_draft_weight_update", "supports_draft_weight_updates",
}  # fmt: skip


def test_the_engine_listens_to_what_makes_workers_forget() -> None:
    """And to what has them read a learned score, which is our own."""
    assert set(WEIGHT_CALLS) == {*FORGETTING, "load_learned"}.difference(COMING_BACK)
    assert all(callable(getattr(EvictionWorker, name)) for name in WEIGHT_CALLS)


def worker_that_notes(forgotten: list[str]) -> Any:
    worker = object.__new__(EvictionCPUWorker)
    note = lambda *, same: forgotten.append("same weights" if same else "weights")  # noqa: E731
    worker._evictor = SimpleNamespace(forget_weights=note)  # type: ignore[assignment]
    return worker


@pytest.mark.parametrize("name", FORGETTING)
def test_vllms_method_runs_and_what_was_derived_is_forgotten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (owner, *_) = (cls for cls in BELOW if name in vars(cls))
    forgotten: list[str] = []
    monkeypatch.setattr(owner, name, lambda self, *args, **kwargs: (args, kwargs, len(forgotten)))
    assert getattr(worker_that_notes(forgotten), name)(1, b=2) == ((1,), {"b": 2}, 0)
    assert forgotten == ["same weights" if name in COMING_BACK else "weights"]


def test_an_update_that_fails_half_way_is_forgotten_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any) -> None:
        raise OSError("no such file")

    (owner, *_) = (cls for cls in BELOW if "reload_weights" in vars(cls))
    monkeypatch.setattr(owner, "reload_weights", fails)
    forgotten: list[str] = []
    with pytest.raises(OSError):
        worker_that_notes(forgotten).reload_weights()
    assert forgotten == ["weights"]


def test_no_method_of_vllms_worker_that_speaks_of_weights_is_overlooked() -> None:
    speaking = {name for cls in BELOW for name in vars(cls) if "weight" in name and not name.startswith("_")}
    assert speaking - HARMLESS <= set(FORGETTING)
