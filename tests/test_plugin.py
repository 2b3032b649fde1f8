"""The entry point is harmless: it imports nothing heavy, can be called again, and leaves stock vLLM as it is."""

from __future__ import annotations

import ast
import logging
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, run_python

SHOW = "print(*sorted(m for m in sys.modules if m.split('.')[0] in {roots}))\n"


def test_import_borders() -> None:
    """Each module of a group is imported after the one before; none of the packages named may have come along."""
    groups = [
        (["vllm_defensive", "vllm_defensive.plugin", "vllm_defensive.plan"], ("vllm", "torch", "pydantic")),
        (["vllm_defensive_kernels.formulas", "vllm_defensive.policy"], ("vllm", "transformers")),
        (
            ["vllm_defensive.settings.engine", "vllm_defensive.settings.request", "vllm_defensive.audit"],
            ("vllm", "transformers"),
        ),
    ]
    code = "import sys\n" + "".join(
        f"import {module}\n" + SHOW.format(roots=forbidden) for modules, forbidden in groups for module in modules
    )
    assert run_python(code) == "\n" * 8


def test_policies_and_kernels_import_only_what_they_may() -> None:
    allowed = {
        "kernels/vllm_defensive_kernels": {"torch", "triton", "vllm_defensive_kernels"},
        "vllm_defensive/policy": {"torch", "vllm_defensive", "vllm_defensive_kernels"},
    }
    for folder, packages in allowed.items():
        for file in (ROOT / folder).glob("*.py"):
            found = imported_packages(file) - set(sys.stdlib_module_names)
            assert found <= packages, f"{file.name} imports {found - packages}"


def imported_packages(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


def test_registering_imports_neither_engine_nor_worker_and_the_engine_no_worker() -> None:
    show = SHOW.format(roots=("vllm_defensive",))
    code = f"import sys\nfrom vllm_defensive.plugin import register\nregister()\n{show}"
    code += f"import vllm_defensive.engine.scheduler\n{show}"
    registered, engine = (set(line.split()) for line in run_python(code).splitlines()[-2:])
    assert registered == {
        "vllm_defensive",
        "vllm_defensive.plugin",
        "vllm_defensive.compat",
        "vllm_defensive.compat.base",
        "vllm_defensive.compat.contract",
        "vllm_defensive.compat.names",
        "vllm_defensive.compat.serving",
        "vllm_defensive.compat.sources",
    }
    assert "vllm_defensive.engine.kv_manager" in engine
    assert not [m for m in engine if m.startswith(("vllm_defensive.worker", "vllm_defensive.serving"))]


def test_modules_of_the_servers_import_one_way() -> None:
    """Each at the top of its file, so that a circle could not be imported at all."""
    for file in (ROOT / "vllm_defensive" / "serving").glob("*.py"):
        tree = ast.parse(file.read_text())
        nested = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node not in tree.body]
        assert not [node.module for node in nested if (node.module or "").startswith("vllm_defensive")], file.name


def test_registering_twice_patches_once() -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_defensive.plugin import register

    register()
    first = EngineArgs.create_engine_config, EngineArgs.add_cli_args
    register()
    assert (EngineArgs.create_engine_config, EngineArgs.add_cli_args) == first


def test_a_mistake_of_ours_does_not_break_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm_defensive.compat import serving
    from vllm_defensive.plugin import register

    def broken(*args: object) -> None:
        raise AttributeError("vLLM has changed")

    monkeypatch.setattr(serving, "patch_cli", broken)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    register()
    assert "vllm_defensive could not be loaded" in caplog.text


def test_without_the_setting_engine_arguments_are_left_alone(tiny_model: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_defensive.plugin import register

    register()
    arguments = EngineArgs(model=str(tiny_model), max_model_len=512)
    config = arguments.create_engine_config()
    assert config.scheduler_config.scheduler_cls is None
    assert "vllm_defensive" not in config.parallel_config.worker_cls
    assert not config.additional_config
    assert (arguments.scheduler_cls, arguments.worker_cls, arguments.block_size) == (None, "auto", None)


STOCK = """
import json, torch
from vllm import LLM, SamplingParams
llm = LLM({model!r}, dtype="bfloat16", enforce_eager=True, max_model_len=512)
params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
outputs = llm.generate([dict(prompt_token_ids=list(range(2, 300)))], params, use_tqdm=False)
sampled = outputs[0].outputs[0]
logprobs = [d[t].logprob for d, t in zip(sampled.logprobs, sampled.token_ids)]
config = llm.llm_engine.vllm_config
print("RESULT", json.dumps([config.compute_hash(), list(sampled.token_ids), logprobs]))
"""


@pytest.mark.slow
@pytest.mark.e2e
def test_without_the_flag_hash_and_answers_are_those_of_a_vllm_that_does_not_know_us(tiny_model: Path) -> None:
    code = STOCK.format(model=str(tiny_model))
    with_us, without = (
        next(line for line in run_python(code, **env).splitlines() if line.startswith("RESULT"))
        for env in ({"VLLM_PLUGINS": "vllm_defensive"}, {"VLLM_PLUGINS": ""})
    )
    assert with_us == without
