"""Echoes: a document is repeated in steps of their own, which cost others no more than a chunk of prefill, and are
gone when it is packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.echoes import MODES, echoes, phase, until
from tests.engine.harness import Harness, text
from tests.engine.integrity import held_blocks, released
from vllm_defensive import packing
from vllm_defensive.engine.life import Phase
from vllm_defensive.packing import ECHO_OVERHEAD, ECHO_TOKENS, echo_tokens


@MODES
def test_the_prompt_is_repeated_over_its_own_blocks_then_packed(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=200, policy="echokv", keep=0.2, asynchronous=asynchronous, chunk=128)
    request_id = h.add(text(500, 0), max_tokens=60)
    until(h, request_id, Phase.ECHOING)
    h.step()
    (echo,) = echoes(h)
    said = h.tokens(echo)
    assert said[:500] == text(500, 0) and said[-501:-1] == text(500, 0)
    assert len(said) - 1000 < ECHO_OVERHEAD
    assert h.manager.req_to_blocks[echo][:16] == h.manager.req_to_blocks[request_id][:16], "no copy"
    h.run()
    assert [e.policy for e in h.evictions] == ["echokv"]
    totals = h.manager.lifecycle.totals
    assert totals.echo_tokens == len(said) - 1 - 500, "the answer that vLLM draws is none of them"
    assert totals.cancelled == 0
    h.assert_all_returned()


@MODES
def test_a_long_prompt_is_repeated_part_by_part(
    tiny_model: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "ECHO_TOKENS", 300)
    h = Harness(tiny_model, num_blocks=200, policy="kvzip", keep=0.2, asynchronous=asynchronous)
    prompt = text(400, 0)
    request_id = h.add(prompt, max_tokens=40)
    until(h, request_id, Phase.PACKED)
    parts = sorted(r for r in h._tokens_of if "-echo-" in r)
    first, second = (h.tokens(r)[len(prompt) : -1] for r in parts)
    assert first[-300:] == prompt[:300]
    assert second[-108:] == prompt[292:], "it begins with the tokens before its part"
    h.run()
    h.assert_all_returned()


@MODES
def test_others_decode_in_every_step_of_an_echo(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="kvzip", keep=0.2, asynchronous=asynchronous, chunk=100)
    other = h.add(text(40, 1), max_tokens=200, extra_args={"kv_eviction": "none"})
    h.step()
    h.step()
    request_id = h.add(text(900, 0), max_tokens=40)
    until(h, request_id, Phase.ECHOING)
    steps = 0
    while phase(h, request_id) is Phase.ECHOING:
        output = h.step()
        steps += 1
        assert output.num_scheduled_tokens[other] == 1 and output.total_num_scheduled_tokens <= 100
        assert request_id not in output.num_scheduled_tokens, "it stands still"
    assert steps > 9
    h.run()
    h.assert_all_returned()


def test_where_positions_run_out_the_window_decides(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="kvzip", keep=0.2, max_model_len=1024)
    report: dict[str, Any] = {"kv_eviction_report": 1}
    short, long = (h.add(text(n, n), max_tokens=20, extra_args=report) for n in (700, 950))
    until(h, long, Phase.PACKED)
    assert h.manager.lifecycle.report(long)["policy"] == "halokv"
    until(h, short, Phase.PACKED)
    assert h.manager.lifecycle.report(short)["policy"] == "kvzip"
    parts = [r for r in h._tokens_of if r.startswith(f"{short}-echo-")]
    assert len(parts) == -(-700 // (1024 - 700 - ECHO_OVERHEAD)), "parts shrink to what is left"
    h.run()
    h.assert_all_returned()


def test_a_boundary_is_the_end_of_what_is_repeated(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="echokv", keep=0.2, reuse="off")
    request_id = h.add(text(600, 0), max_tokens=20, extra_args={"kv_eviction_boundary": 501})
    until(h, request_id, Phase.ECHOING)
    h.step()
    (echo,) = echoes(h)
    assert h.tokens(echo)[:501] == text(600, 0)[:501] and h.tokens(echo)[-502:-1] == text(600, 0)[:501]
    h.run()  # the ghost compares what the question reads, and where
    assert h.evictions[0].region.stop == 501
    h.assert_all_returned()


@MODES
def test_the_second_of_two_equal_documents_is_repeated_though_it_is_in_the_prefix_cache(
    tiny_model: Path, asynchronous: bool
) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="kvzip", keep=0.2, asynchronous=asynchronous)
    first = h.add(text(500, 0), max_tokens=20)
    h.run()
    second = h.add(text(500, 0), max_tokens=20)
    until(h, second, Phase.PACKED)
    assert h.hits[first] == 0 and h.hits[second] >= 448
    assert held_blocks(h.manager, second) < 8 and released(h.manager, second)
    h.run()
    h.assert_all_returned()


@pytest.mark.parametrize(
    "stop, longest, tokens",
    [
        (1000, 8192, ECHO_TOKENS),
        (8192 - ECHO_OVERHEAD - 100, 8192, 100),
        (8192 - ECHO_OVERHEAD - 63, 8192, 0),
        (40, 40 + ECHO_OVERHEAD + 40, 40),
        (40, 40 + ECHO_OVERHEAD + 39, 0),
    ],
)
def test_how_much_is_repeated_at_once(stop: int, longest: int, tokens: int) -> None:
    assert echo_tokens(stop, longest) == tokens


def test_an_echo_is_nobodys_request_in_vllms_gauges(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=300, policy="kvzip", keep=0.2, chunk=100)
    request_id = h.add(text(500, 0), max_tokens=40)
    until(h, request_id, Phase.ECHOING)
    h.step()
    assert echoes(h) and (h.stats[-1].num_running_reqs, h.stats[-1].num_waiting_reqs) == (1, 0)
