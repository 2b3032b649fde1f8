"""A vLLM that we do not know: our flags and settings say so in one line, and all else is as if we were not there."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import vllm

from tests.processes import environment

SCHEDULER = "v1/core/sched/scheduler.py"
RENAMED = "vllm.v1.core.sched.scheduler.Scheduler._get_local_prefix_cache_hit is gone"
LINE = rf"vllm=0\.34\.0: .* supports vLLM 0\.32 and 0\.33; differs: {RENAMED}; install "


def stub(folder: Path, file: str, old: str, new: str) -> Path:
    """Folder for PYTHONPATH of the installed vLLM, called 0.34.0, in which one file is another."""
    stock = Path(vllm.__file__).parent
    folder = folder / "stub"
    linked, copied = stock, folder / "vllm"
    for part in Path(file).parts:
        copied.mkdir(parents=True)
        for entry in linked.iterdir():
            if entry.name != part:
                (copied / entry.name).symlink_to(entry)
        linked, copied = linked / part, copied / part
    assert old in linked.read_text()
    copied.write_text(linked.read_text().replace(old, new))
    version = folder / "vllm" / "_version.py"
    version.unlink()
    version.write_text('__version__ = version = "0.34.0"\n__version_tuple__ = version_tuple = (0, 34, 0)\n')
    return folder


@pytest.fixture(scope="module")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stub(tmp_path_factory.mktemp("renamed"), SCHEDULER, "_get_local_prefix_cache_hit", "_local_hit")


def run(path: Path, code: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """A process that has vLLM from `path`."""
    env = environment(**changes)
    env["PYTHONPATH"] = os.pathsep.join([str(path), env["PYTHONPATH"]])
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)


COMMAND = "import sys; sys.argv[0] = 'vllm'; from vllm.entrypoints.cli.main import main; main()"


@pytest.mark.slow
def test_commands_with_our_flag_end_with_one_line_and_others_run(renamed: Path) -> None:
    flag = run(renamed, COMMAND, "serve", "some/model", "--kv-eviction", "snapkv")
    assert flag.returncode == 2
    last = flag.stderr.splitlines()[-1]
    assert last.startswith("vllm serve: error: vllm=0.34.0: ") and RENAMED in last and "Traceback" not in flag.stderr
    assert run(renamed, COMMAND, "serve", "--help").returncode == 0


ENGINE = """
import os, sys
os.environ["VLLM_PLUGINS"] = ""
from vllm.engine.arg_utils import EngineArgs
def show(**settings):
    config = EngineArgs(model=sys.argv[1], max_model_len=512, additional_config=settings).create_engine_config()
    return config.parallel_config.worker_cls, config.scheduler_config.scheduler_cls, config.compute_hash()
stock = show()
from vllm_defensive.plugin import register
register()
print(show() == stock)
show(kv_eviction={"policy": "snapkv"})
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_settings_raise_and_without_them_the_config_is_stock_vllms(renamed: Path, tiny_model: Path) -> None:
    done = run(renamed, ENGINE, str(tiny_model))
    assert done.stdout.splitlines()[-1] == "True", done.stderr[-2000:]
    assert done.returncode == 1
    assert re.fullmatch(rf"ValueError: {LINE}.*", done.stderr.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.nightly
def test_where_even_the_parser_is_another_nothing_is_installed_and_one_line_says_so(tmp_path: Path) -> None:
    path = stub(tmp_path, "engine/arg_utils.py", "def add_cli_args(", "def add_arguments(")
    code = (
        "from vllm.engine.arg_utils import EngineArgs\nbefore = EngineArgs.create_engine_config\n"
        "from vllm.plugins import load_general_plugins\nload_general_plugins()\n"
        "print(EngineArgs.create_engine_config is before)"
    )
    done = run(path, code)
    assert done.stdout.splitlines()[-1] == "True"
    said = [line for line in (done.stdout + done.stderr).splitlines() if "vllm-defensive" in line]
    assert len(said) == 1 and "vllm=0.34.0" in said[0] and "add_cli_args" in said[0]
    assert "Traceback" not in done.stderr


def test_a_parser_of_an_unknown_vllm_refuses_flags_and_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm_defensive.serving.cli import add_flags

    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    parser = argparse.ArgumentParser("vllm serve")
    parser.add_argument("--additional-config", type=json.loads, default=None)
    add_flags(parser, supported=False)
    assert "vllm=0.34.0" in parser.format_help()
    assert vars(parser.parse_args([])) == {"additional_config": None}
    assert parser.parse_args(["--additional-config", '{"other": 1}']).additional_config == {"other": 1}
    for given in (["--kv-eviction-keep", "0.3"], ["--additional-config", '{"kv_eviction": {"policy": "snapkv"}}']):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(given)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("vllm serve: error: vllm=0.34.0: ") and said.count("\n") == 1
