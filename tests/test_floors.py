"""Imports go down only: diffrc_cli, then the stages, then the rooms they use, then the mathematics."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (  # the longest name that a module's own begins with decides
    ("engines.diffusion", "engines.recipe", "engines.errors", "engines.progress", "engines.interrupt"),
    ("engines.backends", "engines.networks", "engines.data", "engines.store"),
    (
        "engines.synthesis",
        "engines.evaluation",
        "engines.sharing",
        "engines.training",
        "engines.backends.export",
        "engines.backends.forecast",
        "engines.backends.inventory",
        "engines.benchmark",
        "engines.checking",
        "engines.health",
        "engines.study",
    ),
    ("diffrc_cli",),
)
LIGHT = {"diffrc_cli", "engines.errors", "engines.progress"}  # what the command line may import before it knows the command
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for package in ("diffrc_cli", "engines")
    for path in (ROOT / package).rglob("*.py")
)


def floor(module: str) -> int:
    names = {name: level for level, names in enumerate(FLOORS) for name in names}
    homes = [name for name in names if module == name or module.startswith(f"{name}.")]
    assert homes, f"{module} has no floor: give it one in FLOORS and in ARCHITECTURE"
    return names[max(homes, key=len)]


def tree_of(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(nodes: Iterator[ast.AST]) -> set[str]:
    """Absolute names of our own modules among imports; `from a import b` counts as a.b where that is a module."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            joined = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in joined if name in MODULES} or {str(node.module)}
    return found


@pytest.mark.parametrize("module", [m for m in MODULES if m != "engines"])
def test_no_module_imports_from_a_floor_above(module: str) -> None:
    ours = {name for name in imports(ast.walk(tree_of(module))) if name in MODULES and name != "engines"}
    assert {name for name in ours if floor(name) > floor(module)} == set()


def test_the_packages_themselves_import_nothing() -> None:
    assert all(imports(ast.walk(tree_of(module))) <= {"__future__"} for module in ("engines", "diffrc_cli"))


def module_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Statements that run on import: not those in functions, nor those for the type checker alone."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            continue
        yield node
        todo += list(ast.iter_child_nodes(node))


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("diffrc_cli")])
def test_the_command_line_imports_nothing_heavy_at_module_level(module: str) -> None:
    names = imports(module_level(tree_of(module)))
    heavy = {"torch", "numpy", "pydantic", "rich", "PIL", "onnx", "onnxruntime", "sklearn", "pyarrow"}
    assert {name for name in names if name.split(".")[0] in heavy} == set()
    assert {name for name in names if name.startswith("engines") and name not in LIGHT} == set()
