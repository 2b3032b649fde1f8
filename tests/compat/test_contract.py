"""The contract: vLLM keeps it, every kind of breach is named, and the table leaves nothing out.

`tests/cuda` asks the same of vLLM's CUDA wheels, of every release that is supported.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import vllm

from tests.compat.overrides import TABLE, narrower, overridden, unlisted
from tests.processes import ROOT, run_python
from tests.releases import RELEASES
from vllm_defensive.compat import contract, names
from vllm_defensive.compat.sources import Absent, Sources

HERE = ("serving", "engine", "worker", "cpu")
INSTALLED = Path(vllm.__file__).parent


def test_installed_vllm_keeps_it_as_imported_and_as_written() -> None:
    for side in HERE:
        for module in names.BY_SIDE[side]:
            importlib.import_module(module)
    assert contract.check(HERE) == []
    assert contract.check(HERE, INSTALLED) == []


@pytest.mark.slow
@pytest.mark.nightly
def test_nothing_is_imported_for_it() -> None:
    """In a process that has only read vLLM's arguments, as a server's has when eviction is switched on."""
    code = (
        "import sys\nfrom vllm.engine.arg_utils import EngineArgs\nfrom vllm_defensive.compat import contract\n"
        "sides = contract.all_sides()\nbefore = set(sys.modules)\ncontract.require(*sides)\n"
        "print(*(set(sys.modules) - before))\nprint('vllm.v1.worker.gpu_worker' in sys.modules)"
    )
    assert run_python(code).splitlines()[-2:] == ["", "False"]


def test_a_method_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.delattr(Scheduler, "_get_local_prefix_cache_hit")
    gone = "vllm.v1.core.sched.scheduler.Scheduler._get_local_prefix_cache_hit is gone"
    assert contract.check(["engine"]) == [gone]
    contract.require.cache_clear()
    known = r"supports vLLM 0\.32 and 0\.33"
    with pytest.raises(ValueError, match=rf"^vllm=\S*: .* {known}; differs: {gone}; install"):
        contract.require("engine")


def test_a_method_with_other_parameters_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.setattr(Scheduler, "_reserve_prefill_lookahead", lambda self, request, tokens: tokens)
    assert contract.check(["engine"]) == [
        "vllm.v1.core.sched.scheduler.Scheduler._reserve_prefill_lookahead takes (request, tokens), "
        "not (request, num_computed_tokens, num_new_tokens)"
    ]


def test_a_message_stays_one_line_of_a_few_names() -> None:
    message = contract.refusal([f"vllm.a.b{i} is gone" for i in range(9)])
    assert "\n" not in message and "b2 is gone and 6 more; install" in message and "b3" not in message


@pytest.mark.parametrize(
    "version, supported",
    [("0.32.0", True), ("0.32.0+cpu", True), ("0.33.1.dev4+gabc", True), ("0.33.0rc1", True), ("0.31.2", False),
     ("0.34.0", False), ("1.32.0", False), ("0.320.0", False), ("dev", False), ("", False)],
)  # fmt: skip
def test_versions(version: str, supported: bool) -> None:
    assert contract.is_supported(version) == supported


@pytest.mark.parametrize(
    "found, wanted, fits",
    [
        ("a b", "a, b", True),
        ("a b c", "a, b", False),
        ("a", "a, b", False),
        ("b a", "a, b", False),
        ("", "", True),
        ("a", "", False),
        ("a b c", "a, ...", True),
        ("b a", "a, ...", False),
        ("*args **kwargs", "...", True),
        ("x c b a", "..., a, b", True),
        ("x a", "..., a, b", False),
        ("a x b", "a, ..., b", True),
        ("x a b", "a, ..., b", False),
    ],
)
def test_parameters(found: str, wanted: str, fits: bool) -> None:
    assert contract.matches(tuple(found.split()), wanted) == fits


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package in which every way of having a name occurs."""
    folder = tmp_path / "pack"
    (folder / "sub").mkdir(parents=True)
    (folder / "__init__.py").write_text("from .sub import here as there\n")
    (folder / "sub" / "__init__.py").write_text("from pack.sub.low import Low, function as here\n")
    (folder / "sub" / "low.py").write_text(
        "from enum import Enum\nimport os\n"
        "class Low(Enum):\n    FIELD: int\n    def method(self, a, *, b=1): self.inner, self.other[0] = a, b\n"
        "    @property\n    def value(self): ...\n    @classmethod\n    def made(cls, *args, **kwargs): ...\n"
        "if os.name:\n    def function(a, /, b): ...\nelse:\n    def function(): ...\n"
    )
    (folder / "high.py").write_text(
        "from .sub import Low as Base\nclass High(Base):\n    def own(self): ...\n    def wide(self, a, c): ...\n"
    )
    return folder


@pytest.mark.parametrize(
    "module, name, found",
    [
        ("pack", "there", ("a", "b")),
        ("pack.sub", "Low", None),
        ("pack.high", "High.own", ()),
        ("pack.high", "High.method", ("a", "b")),
        ("pack.high", "High.FIELD", None),
        ("pack.high", "High.inner", None),
        ("pack.high", "Base.value", None),
        ("pack.high", "High.made", ("*args", "**kwargs")),
    ],
)
def test_sources_are_read(package: Path, module: str, name: str, found: object) -> None:
    assert Sources(package).find(module, name) == found


@pytest.mark.parametrize(
    "module, name",
    [("pack.none", "a"), ("pack.high", "Low"), ("pack.high", "High.other"), ("pack.high", "High.x"), ("enum", "Enum"),
     ("pack", "there.x"), ("pack.sub.low", "Low.name")],
)  # fmt: skip
def test_what_is_not_in_the_sources_is_absent(package: Path, module: str, name: str) -> None:
    with pytest.raises(Absent):
        Sources(package).find(module, name)


def test_a_build_without_sources_is_judged_by_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__path__", [str(tmp_path)])
    assert contract.check(HERE) == []


# -- the table leaves nothing out -------------------------------------------------------------------------------------


def imports() -> set[tuple[str, str]]:
    """(module, name) of everything that our files import from vLLM."""
    found = set()
    for file in (ROOT / "vllm_defensive").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                found |= {(str(node.module), alias.name) for alias in node.names}
    return found


def test_every_import_from_vllm_is_in_the_table() -> None:
    listed = {(module, name.partition(".")[0]) for module, name in TABLE} | {
        (module.rpartition(".")[0], module.rpartition(".")[2]) for module, _ in TABLE
    }
    assert len(imports()) > 40
    assert imports() - listed == set()


def our_classes() -> list[type]:
    from vllm_defensive.engine import kv_manager, scheduler, spec
    from vllm_defensive.serving import prometheus
    from vllm_defensive.worker.cpu import backend, worker

    modules: list[ModuleType] = [kv_manager, scheduler, spec, prometheus, backend, worker]
    made = {c for m in modules for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__}
    return sorted((c for c in made if any(b.__module__.startswith("vllm.") for b in c.__mro__)), key=str)


def test_every_method_that_overrides_vllms_is_in_the_table_and_takes_what_that_takes() -> None:
    assert sum(1 for cls in our_classes() for _ in overridden(cls)) > 20
    assert set().union(*map(unlisted, our_classes())) == set()
    assert set().union(*map(narrower, our_classes())) == set()


def test_a_method_that_takes_less_is_seen() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    def schedule(self: object) -> None: ...

    less = type("Less", (Scheduler,), {"schedule": schedule, "reset_encoder_cache": schedule})
    less.__module__ = "vllm_defensive.less"
    assert narrower(less) == {"Less.schedule"}
    assert unlisted(less) == {"Less.reset_encoder_cache"}


def test_the_releases_that_are_installed_and_tested_are_those_that_are_supported() -> None:
    assert tuple(tuple(int(part) for part in release.split(".")[:2]) for release in RELEASES) == contract.SUPPORTED
