"""Names of a package and their parameters, read from its source: nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

Found = tuple[str, ...] | None  # the parameters of a function, without `self` and `cls`; None of anything else
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Absent(Exception):
    """What was looked for is not there."""


class Sources:
    """Reads each module once. A name may come from another module, and a member from a class below."""

    def __init__(self, root: Path) -> None:
        """root: the package's folder, called as it is imported."""
        self._root = root
        self._modules: dict[str, _Module] = {}
        self._members: dict[ast.ClassDef, dict[str, Found]] = {}

    def __bool__(self) -> bool:
        """Whether there are sources to read."""
        return (self._root / "__init__.py").exists()

    def find(self, module: str, name: str) -> Found:
        """What `module` calls `name`, such as `Scheduler.schedule`. Raises Absent."""
        first, _, member = name.partition(".")
        module, node = self._top(module, first)
        if not member:
            return _parameters(node)
        if not isinstance(node, ast.ClassDef):
            raise Absent
        return self._member(module, node, member)

    def _top(self, module: str, name: str) -> tuple[str, ast.AST]:
        """What a module calls `name`, and the module where that is written."""
        there = self._module(module)
        node = there.names.get(name)
        if node is None:
            raise Absent
        if not isinstance(node, ast.ImportFrom):
            return module, node
        original = next(alias.name for alias in node.names if name == (alias.asname or alias.name))
        return self._top(there.absolute(node), original)

    def _member(self, module: str, node: ast.ClassDef, name: str) -> Found:
        if node not in self._members:
            self._members[node] = _members(node)
        if name in self._members[node]:
            return self._members[node][name]
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                try:
                    where, below = self._top(module, base.id)
                    if isinstance(below, ast.ClassDef):
                        return self._member(where, below, name)
                except Absent:
                    continue
        raise Absent

    def _module(self, name: str) -> _Module:
        if name not in self._modules:
            package, *rest = name.split(".")
            path = self._root.joinpath(*rest)
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if package != self._root.name or not file.exists():
                raise Absent
            self._modules[name] = _Module(name, file)
        return self._modules[name]


class _Module:
    def __init__(self, name: str, file: Path) -> None:
        self._name, self._file = name, file

    def absolute(self, node: ast.ImportFrom) -> str:
        """The module that an import statement of this one names."""
        package = self._name.split(".") if self._file.name == "__init__.py" else self._name.split(".")[:-1]
        start = package[: len(package) - node.level + 1] if node.level else []
        return ".".join([*start, *([node.module] if node.module else [])])

    @cached_property
    def names(self) -> dict[str, ast.AST]:
        """Of two that are written for different platforms, the first."""
        found: dict[str, ast.AST] = {}
        for name, node in _names(_statements(ast.parse(self._file.read_text(encoding="utf-8")).body)):
            found.setdefault(name, node)
        return found


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module or class, whatever they depend on."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)
            yield from _statements(node.orelse)


def _names(statements: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    for node in statements:
        if isinstance(node, ast.ClassDef | _Function):
            yield node.name, node
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, node) for target in targets if isinstance(target, ast.Name))


def _members(node: ast.ClassDef) -> dict[str, Found]:
    """What a class has, its instances' attributes included."""
    found: dict[str, Found] = {
        inner.attr: None
        for method in node.body
        if isinstance(method, _Function)
        for inner in ast.walk(method)
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and _is_self(inner.value)
    }
    return found | {name: _parameters(made) for name, made in _names(_statements(node.body))}


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _parameters(node: ast.AST) -> Found:
    if not isinstance(node, _Function) or any(_is_property(decorator) for decorator in node.decorator_list):
        return None
    given = node.args
    names = [a.arg for a in (*given.posonlyargs, *given.args)]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [a.arg for a in given.kwonlyargs]
    names += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return tuple(names[1:] if names[:1] in (["self"], ["cls"]) else names)


def _is_property(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Name) and decorator.id in ("property", "cached_property")
