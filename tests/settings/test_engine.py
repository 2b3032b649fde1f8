"""Settings: parsed once, frozen, and refused with one line that names the option, its value and what is allowed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

import vllm_defensive
from vllm_defensive.policy import PRESETS
from vllm_defensive.settings import engine as config
from vllm_defensive.settings.request import RequestFieldError, resolve

POLICIES = ", ".join(config.allowed_policies())


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"policy": "snapkb"}, f"kv_eviction=snapkb: choose one of {POLICIES}"),
        ({"policy": 3}, f"kv_eviction=3: choose one of {POLICIES}"),
        ({"policy": "snapkv", "keep": 1.3}, "kv_eviction_keep=1.3: choose a value in (0, 1]"),
        ({"policy": "snapkv", "keep": 0}, "kv_eviction_keep=0: choose a value in (0, 1]"),
        ({"policy": "snapkv", "keep": "much"}, "kv_eviction_keep=much: choose a value in (0, 1]"),
        ({"policy": "snapkv", "keep": float("nan")}, "kv_eviction_keep=nan: choose a value in (0, 1]"),
        ({"policy": "snapkv", "window": 0}, "kv_eviction_window=0: choose a whole number of tokens, 1 or more"),
        ({"policy": "snapkv", "window": 1.5}, "kv_eviction_window=1.5: choose a whole number of tokens, 1 or more"),
        (
            {"policy": "snapkv", "min_tokens": -1},
            "kv_eviction_min_tokens=-1: choose a whole number of tokens, 1 or more",
        ),
        ({"policy": "snapkv", "audit": 7}, "kv_eviction_audit=7: name a folder"),
        ({"policy": "snapkv", "shared": "both"}, "kv_eviction_shared=both: choose one of keep, evict"),
        ({"policy": "snapkv", "admission": "late"}, "kv_eviction_admission=late: choose one of eager, steady"),
        ({"policy": "snapkv", "policies": 7}, f"kv_eviction_policies=7: choose from {POLICIES}, separated by commas"),
        (
            {"policy": "auto", "score": "both"},
            "kv_eviction_score=both: choose one of auto, window, reconstruct, learned",
        ),
        ({"keep": 7}, "kv_eviction_keep=7: choose a value in (0, 1]"),
        ({"keep": 0.3}, f"kv_eviction_keep: give kv_eviction as well, one of {POLICIES}"),
        ({"policy": "none", "keep": 7}, "kv_eviction_keep=7: choose a value in (0, 1]"),
    ],
    ids=lambda x: x.partition(":")[0] if isinstance(x, str) else "",
)
def test_wrong_values_name_option_value_and_what_is_allowed(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        config.parse(raw)
    assert str(error.value) == message


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"kv_eviction_kepp: unknown setting, choose from policy, score, learned, learn, keep, budget"
    ):
        config.parse({"policy": "snapkv", "kepp": 0.3})


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ValueError) as error:
        config.parse({"policy": "snapkv", "keep": 2, "window": 0})
    assert str(error.value).count(";") == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize("raw", ["snapkv", 0.2, ["snapkv"], True])
def test_anything_but_an_object_is_refused(raw: Any) -> None:
    with pytest.raises(ValueError, match=r"kv_eviction=.*: give an object such as"):
        config.parse(raw)


@pytest.mark.parametrize("raw", [None, {}, {"policy": "none"}, {"policy": "none", "keep": 0.5}])
def test_none_means_off(raw: Any) -> None:
    assert config.parse(raw) is None


def test_the_first_policies_keep_their_names_and_order() -> None:
    names = config.allowed_policies()
    first = ["none", "streamingllm", "snapkv", "adakv", "criticalkv", "defensivekv", "layer-defensivekv"]
    assert [name for name in names if name in first] == first
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", PRESETS)
def test_every_policy_of_the_table_can_be_chosen(name: str) -> None:
    settings = config.parse({"policy": name})
    assert settings is not None and settings.policy == name
    assert (name in config.allowed_policies()) == (not PRESETS[name].internal)


def test_settings_are_frozen_and_survive_their_own_json() -> None:
    settings = config.parse({"policy": "snapkv", "keep": "0.3", "window": "16"})
    assert settings is not None and (settings.keep, settings.window) == (0.3, 16)
    assert config.parse(settings.as_json()) == settings
    with pytest.raises(ValidationError):
        settings.keep = 0.5


@pytest.mark.parametrize("names", ["adakv, halokv", ["adakv", "halokv"], ("halokv", "adakv")], ids=repr)
def test_requests_may_name_listed_policies_the_servers_own_and_none(names: Any) -> None:
    settings = config.parse({"policy": "snapkv", "policies": names})
    assert settings is not None and hash(settings) == hash(config.parse(settings.as_json()))
    assert settings.choices == ["none", "snapkv", "adakv", "halokv"]
    assert [name for name in PRESETS if settings.allows(name)] == settings.choices[1:]


def test_without_a_list_requests_may_name_any_policy() -> None:
    settings = config.parse({"policy": "snapkv"})
    there = [name for name in config.allowed_policies() if name not in ("learnedkv", "learned-halokv")]
    assert settings is not None and settings.choices == there
    assert [name for name in PRESETS if not settings.allows(name)] == ["learnedkv", "learned-halokv"]


@pytest.mark.parametrize("what", [{"learned": "a file"}, {"learning": True}])
def test_learned_policies_are_there_where_there_is_a_score_or_one_is_being_made(what: dict[str, Any]) -> None:
    settings = config.parse({"policy": "snapkv", **what})
    assert settings is not None and settings.choices == config.allowed_policies()
    assert all(map(settings.allows, PRESETS))


def test_settings_are_found_in_a_vllm_config() -> None:
    assert config.from_vllm_config(SimpleNamespace(additional_config={})) is None
    assert config.from_vllm_config(SimpleNamespace()) is None
    found = config.from_vllm_config(SimpleNamespace(additional_config={"kv_eviction": {"policy": "adakv"}}))
    assert found is not None and found.policy == "adakv"


@pytest.mark.parametrize("plugins", ["", "another", "another,vllm_defensive_too"])
def test_the_helper_does_not_promise_what_vllm_will_not_load(plugins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    with pytest.raises(ValueError, match=f"^VLLM_PLUGINS={plugins}: .*add vllm_defensive to it, or unset it"):
        vllm_defensive.engine_kwargs("snapkv")
    assert vllm_defensive.engine_kwargs("none") == {}
    monkeypatch.setenv("VLLM_PLUGINS", f"{plugins},vllm_defensive")
    assert vllm_defensive.engine_kwargs("snapkv")


def test_the_helper_returns_what_llm_takes() -> None:
    arguments = vllm_defensive.engine_kwargs("layer-defensivekv", keep=0.4)
    assert set(arguments) == {"additional_config"}
    assert arguments["additional_config"]["kv_eviction"]["policy"] == "layer-defensivekv"
    assert arguments["additional_config"]["kv_eviction"]["keep"] == 0.4
    assert vllm_defensive.engine_kwargs("none") == {}
    with pytest.raises(ValueError, match=r"kv_eviction_keep=0: choose a value in \(0, 1\]"):
        vllm_defensive.engine_kwargs("snapkv", keep=0)


@pytest.mark.parametrize(
    "engine, boundary, own, expected",
    [
        ("auto", False, None, "halokv"),
        ("auto", True, None, "echokv"),
        ("auto", True, "window", "halokv"),
        ("auto", False, "reconstruct", "echokv"),
        ("window", True, None, "halokv"),
        ("window", True, "auto", "echokv"),
        ("reconstruct", False, None, "echokv"),
    ],
)
def test_auto_is_the_recommended_policy_for_the_kind_of_request(
    engine: str, boundary: bool, own: str | None, expected: str
) -> None:
    settings = config.parse({"policy": "auto", "score": engine})
    fields: dict[str, Any] = {"kv_eviction_boundary": 100} if boundary else {}
    if own is not None:
        fields["kv_eviction_score"] = own
    assert resolve(settings, fields, 400).policy == expected


def test_behind_a_boundary_at_the_prompts_end_nothing_is_asked() -> None:
    settings = config.parse({"policy": "auto", "reuse": "off"})
    assert resolve(settings, {"kv_eviction_boundary": 400}, 400).policy == "halokv"
    assert resolve(settings, {"kv_eviction_boundary": 399}, 400).policy == "echokv"


def test_behind_a_boundary_at_the_prompts_end_later_requests_ask() -> None:
    """Where what is kept outlives its request, as it does by default."""
    settings = config.parse({"policy": "auto"})
    assert resolve(settings, {"kv_eviction_boundary": 400}, 400).policy == "echokv"
    assert resolve(settings, {"kv_eviction_boundary": 400, "kv_eviction_reuse": "off"}, 400).policy == "halokv"


def test_a_gpus_list_that_has_auto_has_what_it_stands_for() -> None:
    settings = config.parse({"policy": "snapkv", "policies": "auto"})
    assert settings.allows("echokv") and settings.allows("halokv") and not settings.allows("adakv")


def test_auto_may_be_asked_for_wherever_its_policies_are_served() -> None:
    everywhere = config.parse({"policy": "none", "per_request": True})
    assert resolve(everywhere, {"kv_eviction": "auto"}, 400).policy == "halokv"
    assert everywhere.reconstructs
    some = config.parse({"policy": "snapkv", "policies": "auto,adakv"})
    assert sorted(some.served) == ["adakv", "echokv", "halokv", "snapkv"]
    none = config.parse({"policy": "snapkv", "policies": "adakv"})
    assert none.served == ["snapkv", "adakv"] and not none.reconstructs
    with pytest.raises(RequestFieldError, match="kv_eviction='auto'"):
        resolve(none, {"kv_eviction": "auto"}, 400)


def test_how_to_score_is_a_question_of_auto_alone() -> None:
    with pytest.raises(ValueError, match="kv_eviction_score=window: goes with kv_eviction auto; leave it out"):
        config.parse({"policy": "snapkv", "policies": "adakv", "score": "window"})
    settings = config.parse({"policy": "snapkv"})
    with pytest.raises(RequestFieldError, match="kv_eviction_score='window': goes with kv_eviction='auto'"):
        resolve(settings, {"kv_eviction_score": "window"}, 400)
    for wrong in ("both", True, 1):
        with pytest.raises(RequestFieldError, match="choose one of auto, window, reconstruct, learned"):
            resolve(settings, {"kv_eviction": "auto", "kv_eviction_score": wrong}, 400)
