"""In how many bits a request is packed: by its own field, the server's, its policy, or the ratio."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_defensive import platforms
from vllm_defensive.packing import OFFERED
from vllm_defensive.platforms import PLATFORMS, choose_widths
from vllm_defensive.settings.engine import EvictionConfig
from vllm_defensive.settings.request import RequestFieldError, resolve

CPU, CUDA = PLATFORMS["cpu"], PLATFORMS["cuda"]


@pytest.fixture(autouse=True)
def no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever machine this is."""
    monkeypatch.setattr(platforms, "has_amx", lambda: False)


def on_cpu(**settings: Any) -> EvictionConfig:
    return choose_widths(EvictionConfig(**{"policy": "auto", **settings}), CPU)


@pytest.mark.parametrize(
    "keep, widths", [(0.05, "k8v4"), (0.1, "k8v4"), (0.15, "8,4"), (0.2, "8,4"), (0.43, "k8v4"), (0.56, "8"), (1, "16")]
)
def test_auto_goes_by_the_ratio(keep: float, widths: str) -> None:
    engine = on_cpu(keep=keep)
    assert engine.meant_widths("auto") == widths
    assert resolve(engine, None, 1000).widths == widths
    assert resolve(on_cpu(), {"kv_eviction_keep": keep}, 1000).widths == widths


@pytest.mark.parametrize("policy, widths", [("halokv", "16"), ("snapkv", "16"), ("rdkv", "16,8,4")])
def test_named_policies_are_packed_as_they_say(policy: str, widths: str) -> None:
    assert resolve(on_cpu(), {"kv_eviction": policy}, 1000).widths == widths
    assert resolve(on_cpu(policy=policy), {}, 1000).widths == widths


@pytest.mark.parametrize("given", [*OFFERED, 8, 4, 16, "8, 4"], ids=str)
def test_a_request_wins_over_the_server_and_the_server_over_the_policy(given: Any) -> None:
    name = str(given).replace(" ", "")
    assert resolve(on_cpu(widths="4"), {"kv_eviction_widths": given}, 1000).widths == name
    assert resolve(on_cpu(policy="halokv", widths=given), {}, 1000).widths == name
    assert resolve(on_cpu(policy="halokv", widths=given), {"kv_eviction": "snapkv"}, 1000).widths == name


def test_auto_of_a_request_is_not_the_servers_choice_but_the_policys() -> None:
    assert resolve(on_cpu(policy="halokv", widths="8"), {"kv_eviction_widths": "auto"}, 1000).widths == "16"


@pytest.mark.parametrize("given", ["4,8", "2", "16,8,4", 3, 8.0, True, None, ["8"], ""], ids=str)
def test_wrong_widths_are_refused_with_what_is_allowed(given: Any) -> None:
    with pytest.raises(RequestFieldError, match=r"kv_eviction_widths=.*: choose one of auto, 16, k8v4, 8, 4, \"8,4\"$"):
        resolve(on_cpu(), {"kv_eviction_widths": given}, 1000)


def test_a_gpus_requests_choose_among_what_is_compiled() -> None:
    engine = choose_widths(EvictionConfig(policy="halokv", policies=("halokv",), widths="k8v4"), CUDA)
    assert engine.classes == ("16", "k8v4")
    assert resolve(engine, {"kv_eviction_widths": "16"}, 1000).widths == "16"
    with pytest.raises(RequestFieldError, match=r"kv_eviction_widths='8,4': choose one of auto, 16, k8v4$"):
        resolve(engine, {"kv_eviction_widths": "8,4"}, 1000)
    auto = choose_widths(EvictionConfig(policy="auto", policies=("auto",)), CUDA)
    assert auto.classes == ("16",) and auto.meant_widths("auto") == "16"


def test_without_a_compiler_cpus_pack_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "compiler", lambda: None)
    engine = on_cpu()
    assert engine.meant_widths("auto") == "16" and engine.classes == ("16",)
    with pytest.raises(RequestFieldError, match=r"kv_eviction='rdkv': this server has no compiled function"):
        resolve(engine, {"kv_eviction": "rdkv"}, 1000)
    with pytest.raises(RequestFieldError, match=r"choose one of auto, 16$"):
        resolve(engine, {"kv_eviction_widths": "8"}, 1000)
    with pytest.raises(
        ValueError, match=r"kv_eviction_widths=8: .*no C.. compiler was found.*install one, or choose 16"
    ):
        on_cpu(widths="8")


def test_with_amx_auto_packs_16_bits_and_requests_may_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "has_amx", lambda: True)
    assert on_cpu().meant_widths("auto") == "16"
    assert resolve(on_cpu(), {"kv_eviction_widths": "k8v4"}, 1000).widths == "k8v4"


def test_a_compiler_that_cannot_link_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms.shutil, "which", lambda name: "/bin/false")
    platforms.compiler.cache_clear()
    assert platforms.compiler() is None
    platforms.compiler.cache_clear()
