"""The flags: how they are folded into vLLM's config, and what a wrong one says. The table below freezes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_defensive.settings import engine as config

POLICIES = ", ".join(config.allowed_policies())
# flag -> (default as --help states it, a value other than that, what it becomes)
FLAGS: dict[str, tuple[str, str | None, Any]] = {
    "--kv-eviction": ("none", "adakv", "adakv"),
    "--kv-eviction-score": ("auto", "window", "window"),
    "--kv-eviction-learned": ("None", "some.safetensors", "some.safetensors"),
    "--kv-eviction-learn": ("False", None, True),
    "--kv-eviction-keep": ("0.2", "0.35", 0.35),
    "--kv-eviction-budget": ("None", "512", 512),
    "--kv-eviction-when": ("always", "full", "full"),
    "--kv-eviction-answers": ("keep", "evict", "evict"),
    "--kv-eviction-interval": ("256", "128", 128),
    "--kv-eviction-prompts": ("whole", "bounded", "bounded"),
    "--kv-eviction-prompt-interval": ("None", "1024", 1024),
    "--kv-eviction-widths": ("auto", "8,4", "8,4"),
    "--kv-eviction-window": ("32", "16", 16),
    "--kv-eviction-min-tokens": ("256", "100", 100),
    "--kv-eviction-audit": ("None", "some/dir", "some/dir"),
    "--kv-eviction-shared": ("keep", "evict", "evict"),
    "--kv-eviction-reuse": ("boundary", "off", "off"),
    "--kv-eviction-pinned": ("0.25", "0.5", 0.5),
    "--kv-eviction-admission": ("eager", "steady", "steady"),
    "--kv-eviction-per-request": ("False", None, True),
    "--kv-eviction-policies": ("None", "adakv, snapkv", ["adakv", "snapkv"]),
}
WRONG = [
    ("--kv-eviction", "snapkb", f"choose one of {POLICIES}"),
    ("--kv-eviction-score", "both", "choose one of auto, window, reconstruct, learned"),
    ("--kv-eviction-keep", "1.3", "choose a value in (0, 1]"),
    ("--kv-eviction-keep", "half", "choose a value in (0, 1]"),
    ("--kv-eviction-budget", "0", "choose a whole number of tokens, 1 or more"),
    ("--kv-eviction-when", "never", "choose one of always, full"),
    ("--kv-eviction-answers", "drop", "choose one of keep, evict"),
    ("--kv-eviction-prompts", "long", "choose one of whole, bounded"),
    ("--kv-eviction-interval", "often", "choose a whole number of tokens, 1 or more"),
    ("--kv-eviction-widths", "4,8", 'choose one of auto, 16, k8v4, 8, 4, "8,4"'),
    ("--kv-eviction-window", "0", "choose a whole number of tokens, 1 or more"),
    ("--kv-eviction-reuse", "on", "choose one of off, boundary, prefix, chat"),
    ("--kv-eviction-pinned", "1", "choose a value in [0, 0.9]"),
    ("--kv-eviction-min-tokens", "many", "choose a whole number of tokens, 1 or more"),
    ("--kv-eviction-shared", "both", "choose one of keep, evict"),
    ("--kv-eviction-admission", "late", "choose one of eager, steady"),
    ("--kv-eviction-policies", "adakv,snapkb", f"choose from {POLICIES}, separated by commas"),
    ("--kv-eviction-policies", "", f"choose from {POLICIES}, separated by commas"),
]


def make_parser() -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))


@pytest.fixture(scope="module")
def parser() -> Any:
    from vllm_defensive.plugin import register

    register()
    return make_parser()


def folded(parser: Any, *flags: str) -> Any:
    """`additional_config["kv_eviction"]` after parsing, None if it is not there."""
    namespace = parser.parse_args(list(flags))
    assert not any(name.startswith("kv_eviction") for name in vars(namespace)), "vLLM must not see our flags"
    return (namespace.additional_config or {}).get("kv_eviction")


def field_of(flag: str) -> str:
    return flag.removeprefix("--kv-eviction").lstrip("-").replace("-", "_") or "policy"


def test_the_flags_and_their_defaults_are_these(parser: Any) -> None:
    (group,) = (g for g in parser._action_groups if g.title == "KV eviction")
    defaults = {a.option_strings[0]: a.help.rpartition("(default: ")[2].rstrip(")") for a in group._group_actions}
    assert defaults == {flag: default for flag, (default, _, _) in FLAGS.items()}
    assert all(len(a.option_strings) == 1 for a in group._group_actions)


@pytest.mark.parametrize("ask", ["--help", "--help=all", "--help=kv eviction", "--help=kv-eviction"])
def test_help_shows_the_group(capsys: pytest.CaptureFixture[str], ask: str) -> None:
    with pytest.raises(SystemExit) as end:
        make_parser().parse_args([ask])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "KV eviction" in text or ask == "--help=kv-eviction"
    if ask != "--help":  # which names the groups only
        assert all(flag in text for flag in FLAGS)
        assert POLICIES in text


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_is_folded_into_additional_config(parser: Any, flag: str) -> None:
    _, value, expected = FLAGS[flag]
    flags = {"--kv-eviction": "snapkv", flag: value}
    found = folded(parser, *(x for item in flags.items() for x in item if x is not None))
    assert found[field_of(flag)] == expected and type(found[field_of(flag)]) is type(expected)
    assert json.loads(json.dumps(found)) == found, "plain JSON: it is hashed, and sent to other processes"


def test_defaults_are_filled_in(parser: Any) -> None:
    """But for that of reuse, which depends on what vLLM settles later."""
    expected = {
        "policy": "snapkv",
        "score": "auto",
        "learn": False,
        "keep": 0.2,
        "when": "always",
        "answers": "keep",
        "interval": 256,
        "prompts": "whole",
        "repeats": "any",
        "widths": "auto",
        "auto_widths": False,
        "window": 32,
        "min_tokens": 256,
        "shared": "keep",
        "pinned": 0.25,
        "admission": "eager",
        "per_request": False,
    }
    assert folded(parser, "--kv-eviction", "snapkv") == expected


def test_without_flags_nothing_is_touched(parser: Any) -> None:
    namespace = parser.parse_args([])
    assert not namespace.additional_config


@pytest.mark.parametrize("flags", [["--kv-eviction", "none"], ["--kv-eviction=none", "--kv-eviction-keep", "0.5"]])
def test_none_deletes_the_key(parser: Any, flags: list[str]) -> None:
    given = json.dumps({"kv_eviction": {"policy": "snapkv"}, "other": 1})
    namespace = parser.parse_args(["--additional-config", given, *flags])
    assert namespace.additional_config == {"other": 1}


def test_flags_win_over_additional_config(parser: Any) -> None:
    given = json.dumps({"kv_eviction": {"policy": "snapkv", "keep": 0.5, "window": 8}, "other": 1})
    namespace = parser.parse_args(["--additional-config", given, "--kv-eviction-keep", "0.1"])
    found = namespace.additional_config
    assert found["other"] == 1
    assert (found["kv_eviction"]["policy"], found["kv_eviction"]["keep"], found["kv_eviction"]["window"]) == (
        "snapkv",
        0.1,
        8,
    )


def test_a_yaml_config_says_the_same(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    file = tmp_path / "serve.yaml"
    file.write_text("kv-eviction: layer-defensivekv\nkv-eviction-keep: 0.3\nkv-eviction-per-request: true\n")
    parser = FlexibleArgumentParser(prog="vllm serve")
    parser.add_argument("--config")
    parser.add_argument("command")
    parser.add_argument("model_tag", nargs="?")
    EngineArgs.add_cli_args(parser)
    found = folded(parser, "serve", "some-model", "--config", str(file), "--kv-eviction-window", "8") or {}
    assert (found["policy"], found["keep"], found["per_request"], found["window"]) == (
        "layer-defensivekv",
        0.3,
        True,
        8,
    )


def last_words(parser: Any, flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What goes to stderr when parsing ends with exit code 2; it must be one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        parser.parse_args(flags)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith("\n")
    return error


@pytest.mark.parametrize("flag, value, allowed", WRONG)
def test_wrong_values_exit_with_one_line(
    parser: Any, capsys: pytest.CaptureFixture[str], flag: str, value: str, allowed: str
) -> None:
    flags = ["--kv-eviction", "snapkv", flag, value]
    assert last_words(parser, flags, capsys) == f"vllm serve: error: {flag}={value}: {allowed}\n"


def test_a_setting_without_a_policy_is_refused(parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    error = last_words(parser, ["--kv-eviction-keep", "0.3"], capsys)
    assert error == f"vllm serve: error: --kv-eviction-keep: give --kv-eviction as well, one of {POLICIES}\n"


def test_a_wrong_value_is_named_before_a_policy_that_is_missing(
    parser: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    error = last_words(parser, ["--kv-eviction-keep", "7"], capsys)
    assert error == "vllm serve: error: --kv-eviction-keep=7: choose a value in (0, 1]\n"


def test_flags_are_added_once_to_a_parser(parser: Any) -> None:
    from vllm_defensive.serving.cli import add_flags

    add_flags(parser)
    assert sum(a.option_strings == ["--kv-eviction"] for a in parser._actions) == 1
