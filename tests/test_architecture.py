"""Arrows of the house: who may import whom, read from the sources without running them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for part in ("flows", "components", "infra", "tests") for path in (ROOT / part).rglob("*.py"))
LONGEST = 400

# Folder or module: what it may not import, wherever in the file, also for types only.
FORBIDDEN = {
    "components": ["prefect", "flows", "infra", "tests"],
    "flows": ["tests"],
    "infra": ["components", "flows", "tests"],
    "components/data": [f"components.{part}" for part in ("training", "evaluation", "registry", "serving", "adapters")],
    "components/adapters": [f"components.{part}" for part in ("training", "evaluation", "registry", "serving", "data")],
    "components/evaluation": ["mlflow", "boto3", "botocore", "components.registry", "components.storage"],
    "components/errors.py": ["components"],
    "components/digest.py": ["components"],
}


def imported(source: str, package: str) -> set[str]:
    """Every module that a source imports, at any depth of nesting; `from a import b` counts as `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found.update([module, *(f"{module}.{name.name}" for name in node.names)])
    return found


def trespasses(path: Path, forbidden: list[str]) -> list[str]:
    package = ".".join(path.parent.relative_to(ROOT).parts)
    names = imported(path.read_text(encoding="utf-8"), package)
    return sorted(name for name in names for other in forbidden if name == other or name.startswith(f"{other}."))


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_run_one_way(place: str) -> None:
    paths = [path for path in SOURCES if path.is_relative_to(ROOT / place)]
    assert paths  # a folder that was renamed must not pass unseen
    found = {str(path.relative_to(ROOT)): trespasses(path, FORBIDDEN[place]) for path in paths}
    assert {name: imports for name, imports in found.items() if imports} == {}


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length >= LONGEST} == {}


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import a.b", "a.b"),
        ("import a as b", "a"),
        ("from a import b", "a.b"),
        ("from a.b import c", "a.b"),
        ("def f():\n    if x:\n        from a import b", "a"),
        ("from . import storage", "components.data.storage"),
        ("from ..registry import bundle", "components.registry.bundle"),
    ],
)
def test_imports_are_seen_wherever_they_stand(source: str, module: str) -> None:
    assert module in imported(source, "components.data")
