"""Which layers read which cache, and what becomes of their scores."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from vllm_defensive.policy import LayerScores
from vllm_defensive.worker.readers import Readers


def attention(target: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(kv_sharing_target_layer_name=target)


CONTEXT = {
    "0": attention(),
    "1": attention(),
    "state": SimpleNamespace(),  # of another kind, which shares nothing
    "2": attention(),
    "3": attention("2"),
    "4": attention("0"),
    "5": attention("2"),
}


def test_readers_come_cache_after_cache_whoever_vllm_lists_in_the_group() -> None:
    """Before and after it has added those that share a cache; of layers in other groups nothing is seen."""
    for listed in (["0", "2"], ["0", "2", "3", "4", "5"]):
        readers, names = Readers.find(listed, CONTEXT)
        assert names == ["0", "4", "2", "3", "5"]
        assert readers.caches == (0, 0, 1, 1, 1) and len(readers) == 5
        assert readers.of_layer == (range(0, 2), range(2, 5)) and readers.own == [0, 2]


def test_where_nothing_is_shared_each_layer_reads_its_own() -> None:
    readers, names = Readers.find(["1"], CONTEXT)
    assert (names, readers) == (["1"], Readers.one_each(1))
    scores = [LayerScores(torch.rand(2, 5)) for _ in range(3)]
    assert all(a is b for a, b in zip(Readers.one_each(3).largest(scores), scores, strict=True))


def test_a_tokens_score_is_the_largest_of_its_readers() -> None:
    inf = float("inf")
    first = LayerScores(torch.tensor([[1.0, 5.0, inf]]), torch.tensor([[0.0, 1.0, inf]]), None, torch.tensor([True]))
    second = LayerScores(torch.tensor([[2.0, 3.0, inf]]), torch.tensor([[4.0, 0.0, inf]]), None, torch.tensor([False]))
    alone = LayerScores(torch.zeros(1, 3), None, torch.tensor(2.0))
    (joint, other) = Readers((0, 0, 1)).largest([first, second, alone])
    assert joint.scores_HE.tolist() == [[2.0, 5.0, inf]] and joint.preference is None
    assert joint.rank_HE is not None and joint.rank_HE.tolist() == [[4.0, 1.0, inf]]
    assert joint.local_H is not None and joint.local_H.tolist() == [False], "somebody looks elsewhere"
    assert other is alone
