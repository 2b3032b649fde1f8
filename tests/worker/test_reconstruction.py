"""Which parts of a prompt were repeated to their end, and whose peaks are kept meanwhile; on any device."""

from __future__ import annotations

import pytest
import torch

from vllm_defensive.packing import Region
from vllm_defensive.plan import Reconstruction
from vllm_defensive.worker.reconstruction import Reconstructions
from vllm_defensive.worker.window import IncompleteError

L, H, STOP = 3, 2, 100
WHOLE = Region(STOP, 0, 32, 16, 16)
PARTS = {(0, 60): 170, (60, 100): 150}  # and the end of an echo that repeats it


def part(positions: tuple[int, int], request_id: str = "a") -> Reconstruction:
    return Reconstruction(request_id, STOP, positions, PARTS[positions], "chunk")


@pytest.fixture
def peaks() -> Reconstructions:
    return Reconstructions(L, H)


def repeat(peaks: Reconstructions, positions: tuple[int, int], *ends: int) -> torch.Tensor:
    """An echo passes in chunks that end there."""
    for begin, end in zip((STOP, *ends), ends, strict=False):
        peak_LHT = peaks.plan(part(positions), (begin, end))
    return peak_LHT


def test_all_parts_in_any_chunks_are_a_whole(peaks: Reconstructions) -> None:
    peak_LHT = repeat(peaks, (0, 60), 130, 169, 170)
    assert peak_LHT.shape == (L, H, STOP) and not peak_LHT.any()
    peak_LHT[1] = 0.5
    assert repeat(peaks, (60, 100), 150) is peak_LHT
    assert peaks.pop("a", WHOLE) is peak_LHT
    with pytest.raises(IncompleteError, match="of its prompt 0 tokens were repeated"):
        peaks.pop("a", WHOLE)


def test_a_step_that_is_planned_twice_counts_once(peaks: Reconstructions) -> None:
    for positions, middle in (((0, 60), 120), ((60, 100), 149)):
        for chunk in ((STOP, middle), (STOP, middle), (middle, PARTS[positions]), (middle, PARTS[positions])):
            peaks.plan(part(positions), chunk)
    assert peaks.pop("a", WHOLE).shape == (L, H, STOP)


@pytest.mark.parametrize("ends", [(130,), (130, 169)], ids=["first-chunk", "all-but-one"])
def test_an_echo_that_was_cut_short_is_no_whole_and_another_one_may_end_it(
    peaks: Reconstructions, ends: tuple[int, ...]
) -> None:
    repeat(peaks, (0, 60), *ends)
    repeat(peaks, (60, 100), 150)
    again = Reconstructions(L, H)
    again._seen = dict(peaks._seen)
    with pytest.raises(IncompleteError, match="of its prompt 40 tokens were repeated"):
        peaks.pop("a", WHOLE)
    repeat(again, (0, 60), 110, 170)
    again.pop("a", WHOLE)


def test_a_part_with_a_gap_is_no_whole(peaks: Reconstructions) -> None:
    repeat(peaks, (0, 60), 130)
    peaks.plan(part((0, 60)), (140, 170))
    with pytest.raises(IncompleteError, match="of its prompt 0 tokens"):
        peaks.pop("a", WHOLE)


def test_what_others_share_need_not_be_repeated(peaks: Reconstructions) -> None:
    repeat(peaks, (60, 100), 150)
    with pytest.raises(IncompleteError):
        peaks.pop("a", Region(STOP, 3, 32, 16, 16))
    positions = (64, 100)
    peaks.plan(Reconstruction("a", STOP, positions, 150, "all"), (STOP, 150))
    peaks.pop("a", Region(STOP, 4, 32, 16, 16))


def test_one_request_at_a_time_and_none_that_is_gone(peaks: Reconstructions) -> None:
    repeat(peaks, (0, 60), 170)
    peaks.plan(part((60, 100), "b"), (STOP, 150))
    assert list(peaks._seen) == ["b"]
    peaks.drop("b")
    peaks.drop("a")
    assert not peaks._seen
