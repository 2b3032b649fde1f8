"""What a learned score changes for the scheduler: nothing is computed for it, and images may not be scored by it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.harness import Harness, text
from tests.learned_scores import random_score


@pytest.fixture
def harness(tiny_model: Path, tmp_path: Path) -> Harness:
    random_score(tiny_model, tmp_path / "score.safetensors", 2, 2, 32)
    learned = str(tmp_path / "score.safetensors")
    return Harness(tiny_model, num_blocks=300, policy="learnedkv", keep=0.2, learned=learned, shared="evict")


@pytest.mark.parametrize(
    "policy, computed", [("learnedkv", 1), ("learned-halokv", 32), ("halokv", 32)], ids=lambda value: str(value)
)
def test_a_prompt_in_the_prefix_cache_is_evicted_as_it_lies_there(harness: Harness, policy: str, computed: int) -> None:
    """But for the block of its last token, as where nothing is evicted; a window is computed whole."""
    prompt, fields = text(640, 1), {"kv_eviction": policy}
    harness.add(prompt, max_tokens=2, extra_args=fields)
    harness.run()
    again = harness.add(prompt, max_tokens=2, extra_args=fields)
    harness.run()
    assert harness.hits[again] == (640 - computed) // harness.block_size * harness.block_size
    assert [eviction.policy for eviction in harness.evictions] == [policy] * 2
    harness.assert_all_returned()


@pytest.mark.parametrize("own, expected", [(True, "halokv"), (False, "learnedkv")])
def test_images_with_positions_of_their_own_are_scored_by_the_window(
    harness: Harness, own: bool, expected: str
) -> None:
    outlook = harness.manager.outlook
    outlook.own_positions = own
    place = SimpleNamespace(offset=4, length=16)
    image = SimpleNamespace(modality="image", mm_position=place)
    request: Any = SimpleNamespace(
        request_id="r", mm_features=[image], resumable=False, num_prompt_tokens=640, num_tokens=640, max_tokens=8
    )
    request.sampling_params = SimpleNamespace(extra_args=None)
    assert outlook.foresee(request, lambda request_id: ()).settings.policy == expected
    request.mm_features = []
    assert outlook.foresee(request, lambda request_id: ()).settings.policy == "learnedkv"
