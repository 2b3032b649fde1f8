"""`python -m vllm_defensive.doctor`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import vllm

from vllm_defensive import doctor
from vllm_defensive.compat import contract


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Its exit code, or the message that it ends with."""
    monkeypatch.setattr(sys, "argv", ["doctor", *arguments])
    try:
        doctor.main()
    except SystemExit as ended:
        return ended.code
    return 0


def test_an_installation_as_it_should_be(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"vllm={vllm.__version__}: all ")
    assert said.endswith(" names that eviction leans on are as expected\n") and said.count("\n") == 1


def test_what_differs_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.delattr(Scheduler, "_get_local_prefix_cache_hit")
    assert run(monkeypatch) == 1
    assert capsys.readouterr().out == "vllm.v1.core.sched.scheduler.Scheduler._get_local_prefix_cache_hit is gone\n"
    (tmp_path / "__init__.py").touch()
    assert run(monkeypatch, str(tmp_path)) == 1
    assert len(capsys.readouterr().out.splitlines()) > 300
    assert run(monkeypatch, str(tmp_path / "nothing")) == 2


def test_an_unknown_version_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    assert run(monkeypatch) == contract.refusal()
