"""Our classes and checks are chosen before any process is started, and requests judged by their engine's settings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.learned_scores import random_score
from tests.processes import run_python
from vllm_defensive import learned, platforms, startup


def arguments(**changes: Any) -> Any:
    """Engine arguments as they are before vLLM settles them."""
    defaults = {"scheduler_cls": None, "worker_cls": "auto", "block_size": None}
    defaults |= {"model": "none", "revision": None, "download_dir": None}
    return SimpleNamespace(**{**defaults, "additional_config": {"kv_eviction": {"policy": "snapkv"}}, **changes})


def test_our_classes_and_the_smallest_block_are_chosen() -> None:
    chosen = arguments()
    assert startup.prepare(chosen) is not None
    assert chosen.scheduler_cls == startup.SCHEDULER
    assert (chosen.worker_cls, chosen.block_size) == platforms.PLATFORMS["cpu"]
    again = arguments(**{k: v for k, v in vars(chosen).items() if k != "additional_config"})
    assert startup.prepare(again) is not None, "arguments that went through once may go through again"


def test_a_platform_without_a_worker_of_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    tpu = SimpleNamespace(is_cuda=lambda: False, is_cpu=lambda: False, device_name="tpu")
    monkeypatch.setattr(vllm.platforms, "current_platform", tpu)
    with pytest.raises(ValueError, match=r"^device=tpu: .* use an NVIDIA GPU or the CPU build of vLLM, or turn"):
        startup.prepare(arguments())


MADE = """
import sys
from vllm.engine.arg_utils import {args}
from vllm_defensive import engine_kwargs, startup
assert startup.prepare({args}(model={model!r}, **engine_kwargs("snapkv"))) is not None
print("vllm.entrypoints.openai.responses.serving" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("args, imported", [("EngineArgs", "False"), ("AsyncEngineArgs", "True")])
def test_servers_are_imported_for_servers_only(args: str, imported: str, tiny_model: Path) -> None:
    assert run_python(MADE.format(args=args, model=str(tiny_model))).splitlines()[-1] == imported


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    gpu = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False, device_name="gpu")
    monkeypatch.setattr(vllm.platforms, "current_platform", gpu)


def on(additional: dict[str, Any]) -> Any:
    """As much of an engine as `generate` looks at."""
    chosen = arguments(additional_config={"kv_eviction": additional})
    startup.prepare(chosen)
    return SimpleNamespace(vllm_config=SimpleNamespace(additional_config=chosen.additional_config))


TOKENS = {"type": "token", "prompt_token_ids": [1] * 20}


def test_a_request_to_a_gpu_may_name_only_what_is_compiled_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that runs for one client makes all the others wait."""
    from vllm.exceptions import VLLMValidationError

    pretend_gpu(monkeypatch)
    engine = on({"policy": "snapkv"})
    for name in ("none", "snapkv"):
        generate(engine, TOKENS, kv_eviction=name)
    with pytest.raises(VLLMValidationError, match=r"^kv_eviction='adakv': choose one of none, snapkv, which --kv-evic"):
        generate(engine, TOKENS, kv_eviction="adakv")
    generate(on({"policy": "snapkv", "policies": "adakv"}), TOKENS, kv_eviction="adakv")


def test_a_gpu_without_a_policy_wants_to_know_which_ones_requests_will_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    on({"per_request": True})
    pretend_gpu(monkeypatch)
    generate(on({"per_request": True, "policies": ["snapkv"]}), TOKENS, kv_eviction="snapkv")
    with pytest.raises(ValueError, match=r"^kv_eviction_per_request=True: .*kv_eviction_policies \(--kv-eviction-pol"):
        on({"per_request": True})


def test_a_list_of_policies_holds_on_cpus_as_well() -> None:
    from vllm.exceptions import VLLMValidationError

    engine = on({"policy": "snapkv", "policies": "adakv"})
    for name in ("none", "snapkv", "adakv"):
        generate(engine, TOKENS, kv_eviction=name)
    for name in ("h2o", "snapkb"):
        with pytest.raises(VLLMValidationError, match=f"^kv_eviction='{name}': choose one of none, snapkv, adakv, "):
            generate(engine, TOKENS, kv_eviction=name)


@pytest.mark.parametrize("name", ["kv-eviction-keep", "KV_EVICTION_KEEP", "kvEvictionKeep", " kv_eviction_keep"])
def test_fields_spelled_otherwise_are_refused_and_told_how(name: str) -> None:
    """vLLM passes over what it does not know."""
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=f"^{name}=0.5: spell it kv_eviction_keep "):
        generate(on({"policy": "snapkv"}), TOKENS, **{name: 0.5})


def test_the_callers_settings_are_left_alone() -> None:
    """One dict may serve several engines."""
    for policy in ("snapkv", "none"):
        mine = {"kv_eviction": {"policy": policy}, "other": 1}
        chosen = arguments(additional_config=mine)
        startup.prepare(chosen)
        assert mine == {"kv_eviction": {"policy": policy}, "other": 1}
        assert chosen.additional_config["other"] == 1


def generate(engine: Any, prompt: Any, **fields: Any) -> None:
    """Ask an `AsyncLLM`, as far as the generator that it answers with."""
    from vllm import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    AsyncLLM.generate(engine, prompt, SamplingParams(extra_args=fields), "request")


def test_each_engine_of_a_process_judges_requests_by_its_own_settings() -> None:
    from vllm.exceptions import VLLMValidationError

    chosen = arguments()
    startup.prepare(chosen)
    evicting, stock = (
        SimpleNamespace(vllm_config=SimpleNamespace(additional_config=additional))
        for additional in (chosen.additional_config, {})
    )
    tokens = {"type": "token", "prompt_token_ids": [1] * 20}
    generate(evicting, tokens, kv_eviction_boundary=20)
    with pytest.raises(VLLMValidationError, match="kv_eviction_boundary=21: the prompt has 20 tokens"):
        generate(evicting, tokens, kv_eviction_boundary=21)
    generate(stock, tokens, kv_eviction_boundary=21)


def test_fields_of_a_session_are_refused_for_sessions_are_never_evicted() -> None:
    from vllm.exceptions import VLLMValidationError

    async def pieces() -> AsyncIterator[Any]:
        yield {"type": "token", "prompt_token_ids": [1] * 20}

    chosen = arguments()
    startup.prepare(chosen)
    engine = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=chosen.additional_config))
    generate(engine, pieces())
    with pytest.raises(VLLMValidationError, match=r"kv_eviction_boundary=10: .*session.* never evicted; leave it out"):
        generate(engine, pieces(), kv_eviction_boundary=10)


@pytest.mark.parametrize("prompt", ["text", {"prompt": "text"}, {"prompt_token_ids": None}], ids=repr)
def test_a_prompt_that_is_not_yet_tokenized_is_judged_later(prompt: Any) -> None:
    chosen = arguments()
    startup.prepare(chosen)
    engine = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=chosen.additional_config))
    generate(engine, prompt, kv_eviction_boundary=3)


def test_a_block_size_of_the_users_is_kept() -> None:
    chosen = arguments(block_size=128)
    startup.prepare(chosen)
    assert chosen.block_size == 128


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scheduler_cls": "a.B"}, "scheduler_cls=a.B: .* drop --scheduler-cls"),
        ({"worker_cls": "a.B"}, "worker_cls=a.B: .* drop --worker-cls"),
        ({"block_size": 48}, "block_size=48: .* choose a multiple of 32"),
        ({"additional_config": {"kv_eviction": {"policy": "snapkb"}}}, "kv_eviction=snapkb: choose one of"),
        ({"additional_config": {"kv_eviction": "snapkv"}}, "kv_eviction='snapkv': give an object"),
    ],
)
def test_options_that_contradict_it_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        startup.prepare(arguments(**changes))


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, {"kv_eviction": {"policy": "none"}, "other": 1}])
def test_without_a_policy_nothing_is_set(additional: dict[str, Any] | None) -> None:
    chosen = arguments(additional_config=additional)
    assert startup.prepare(chosen) is None
    assert (chosen.scheduler_cls, chosen.worker_cls, chosen.block_size) == (None, "auto", None)
    assert not chosen.additional_config or chosen.additional_config == {"other": 1}


def learning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, works: bool = True) -> list[str]:
    """A model in `tmp_path`, whose score is made as by the command. Returns the models that it was made of."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    made: list[str] = []

    def in_own_process(engine_args: Any) -> None:
        made.append(engine_args.model)
        if not works:
            raise ValueError("no room")
        random_score(tmp_path, learned.path_for(""), 2, 2, 32)

    monkeypatch.setattr(learned, "path_for", lambda of_model: tmp_path / "score")
    monkeypatch.setattr(startup.learn, "in_own_process", in_own_process)
    return made


def test_a_learned_score_is_made_where_it_is_asked_for_and_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = learning(monkeypatch, tmp_path)
    asked = {"kv_eviction": {"policy": "learnedkv", "learn": True}}
    for _ in range(2):  # the second one, as another API server, finds it
        settings = startup.prepare(arguments(model=str(tmp_path), additional_config=asked))
        assert settings is not None and settings.learned == str(tmp_path / "score")
    assert made == [str(tmp_path)]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"policy": "auto", "learn": True}, "^no room$"),
        (
            {"policy": "learnedkv"},
            "^kv_eviction=learnedkv: .* has no learned score yet; make it with python -m ",
        ),
    ],
)
def test_without_a_score_that_is_asked_for_nothing_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    learning(monkeypatch, tmp_path, works=False)
    with pytest.raises(ValueError, match=message):
        startup.prepare(arguments(model=str(tmp_path), additional_config={"kv_eviction": settings}))
