"""Imports run one way. The map below is the house's: who is not in a row may not be imported from there."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.processes import ROOT

_SHARED = {"packing", "plan", "counts"}
ALLOWED = {
    "__init__": {"settings"},
    "packing": set(),
    "plan": {"packing"},
    "counts": {"plan"},
    "policy": {"packing"},
    "learned": {"compat"},
    "settings": {"packing", "policy"},
    "compat": {"plan", "counts", "__init__"},  # __init__: our version, which a refusal names
    "platforms": {"packing", "settings", "policy"},
    "limits": {"platforms", "settings", "audit", "engine"},  # engine: the spec by which an evictable layer is known
    "startup": {"learned", "platforms", "settings", "compat", "serving", "tools"},  # tools: a score may be made first
    "serving": {"learned", "packing", "platforms", "settings", "compat", "counts"},
    "engine": {"settings", "compat", "policy", *_SHARED},
    "audit": {"compat", "policy", "plan"},
    "worker": {
        "settings",
        "compat",
        "policy",
        "audit",
        "learned",
        "limits",
        "platforms",
        "engine",
        *_SHARED,
    },  # engine: the spec, again
    # compat, platforms, worker: to make a learned score takes an engine
    "tools": {"audit", "learned", "packing", "platforms", "settings", "worker"},
    "planner": {"tools"},
    "learn": {"tools"},
    "doctor": {"compat"},
    "plugin": {"compat", "startup", "limits", "serving"},
}


def modules_of(package: str) -> dict[str, Path]:
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in (ROOT / package).rglob("*.py")
    }


MODULES, BENCHMARKS = modules_of("vllm_defensive"), modules_of("benchmarks")


def imported(module: str, modules: Mapping[str, Path] = MODULES) -> set[str]:
    """Modules of the package that a module imports, at once or when it is called."""
    return {name for node in statements(ast.parse(modules[module].read_text())) for name in names(node, modules)}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a module but what only its command runs."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)):
            yield node
            yield from statements(node)


def names(node: ast.AST, modules: Mapping[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
    if isinstance(node, ast.ImportFrom) and node.module in modules:
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full in modules else node.module


def part_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def test_every_part_imports_only_what_the_map_allows() -> None:
    for module in MODULES:
        part = part_of(module)
        found = {part_of(name) for name in imported(module)} - {part}
        assert found <= ALLOWED[part], f"{module} imports {found - ALLOWED[part]}"


@pytest.mark.parametrize("modules", [MODULES, BENCHMARKS], ids=["vllm_defensive", "benchmarks"])
def test_no_module_is_imported_by_what_it_imports(modules: Mapping[str, Path]) -> None:
    """A circle raises CycleError, which names it. Imports inside functions count."""
    TopologicalSorter({module: imported(module, modules) - {module} for module in modules}).prepare()


def test_of_the_engine_workers_and_limits_know_only_the_spec() -> None:
    """vLLM's worker hands it to its scheduler; all else goes through the records that both share."""
    for part in ("worker", "limits"):
        found = set().union(*(imported(module) for module in MODULES if part_of(module) == part))
        assert {name for name in found if part_of(name) == "engine"} == {"vllm_defensive.engine.spec"}


def test_devices_know_nothing_of_each_other() -> None:
    for device, other in (("cpu", "cuda"), ("cuda", "cpu")):
        inside = [module for module in MODULES if module.startswith(f"vllm_defensive.worker.{device}")]
        found = set().union(*map(imported, inside))
        assert not any(name.startswith(f"vllm_defensive.worker.{other}") for name in found)
