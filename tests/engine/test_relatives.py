"""Who is compared with whom, when it is asked what a request shares: this runs in the scheduler's step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm_defensive.engine.life import Life, Phase
from vllm_defensive.engine.sharing import Relatives, worth_sharing
from vllm_defensive.settings.request import RequestSettings


def family(size: int, keep: float = 0.2, **life: Any) -> tuple[list[Life], Relatives, list[Life]]:
    """Lives of requests of two blocks that wait: the first is everybody's. Also an empty list for those asked for."""
    relatives, lives = Relatives(), []
    for i in range(size):
        request: Any = SimpleNamespace(
            request_id=str(i), block_hashes=[b"document", f"question {i}".encode()], skip_reading_prefix_cache=False
        )
        relatives.add(request)
        settings = RequestSettings(policy="snapkv", keep=keep)
        lives.append(Life(request, settings, 64, **{"phase": Phase.PREFILL, **life}))
    return lives, relatives, []


def shared_of(life: Life, lives: list[Life], relatives: Relatives, asked: list[Life]) -> int:
    def life_of(request: Any) -> Life:
        asked.append(lives[int(request.request_id)])
        return asked[-1]

    keep = life.settings.keep
    assert keep is not None
    return worth_sharing(life, keep, 2, 32, relatives, life_of)


def test_of_a_thousand_waiting_requests_a_few_are_compared() -> None:
    """It runs in the scheduler's step. What is shared is what it is with all of them."""
    lives, relatives, asked = family(1000)
    assert shared_of(lives[999], lives, relatives, asked) == 1
    assert 5 <= len(asked) <= 100
    lives, relatives, asked = family(1000, keep=0.002)
    assert shared_of(lives[999], lives, relatives, asked) == 1, "a tiny ratio wants five hundred sharers"
    assert 500 <= len(asked) <= 1000


def test_strangers_are_not_even_looked_at() -> None:
    lives, relatives, asked = family(5)
    for i in range(1000):
        relatives.add(SimpleNamespace(request_id=f"stranger {i}", block_hashes=[f"other {i}".encode()]))
    assert shared_of(lives[0], lives, relatives, asked) == 1
    assert len(asked) == 4


def test_who_is_gone_after_its_prefill_is_nobody_to_share_with() -> None:
    lives, relatives, asked = family(6)
    assert shared_of(lives[0], lives, relatives, asked) == 1
    lives, relatives, asked = family(6, phase=Phase.WHOLE, brief=True)
    assert shared_of(lives[0], lives, relatives, asked) == 0


def test_a_request_that_has_left_is_no_relative() -> None:
    lives, relatives, asked = family(6)
    for i in range(1, 6):
        relatives.remove(str(i))
    relatives.remove("unknown")
    assert shared_of(lives[0], lives, relatives, asked) == 0 and not asked
