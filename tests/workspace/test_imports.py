"""Who may import whom, and no circles: the picture in docs/architecture.md, checked."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

# Package -> the siblings that it may import anywhere.
ALLOWED = {
    "blt_data": set[str](),
    "blt_model": set[str](),
    "blt_patcher": {"blt_data", "blt_model"},
    "blt_train": {"blt_data", "blt_model", "blt_patcher"},
}
# Modules of blt_patcher for those who have torch; the others never import it or the model.
ENTROPY_MODULES = {"entropies", "executors", "precompute", "calibrate", "cli", "worker_options", "tensors"}


def package_modules(repository: Path, package: str) -> dict[str, Path]:
    source = repository / "packages" / package.replace("_", "-") / "src"
    names = {}
    for path in sorted((source / package).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported(path: Path, *, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_siblings(package: str, repository: Path) -> None:
    for module, path in package_modules(repository, package).items():
        siblings = {name.split(".")[0] for name in imported(path, top_level_only=False)} & set(ALLOWED) - {package}
        assert siblings <= ALLOWED[package], f"{module} imports {siblings - ALLOWED[package]}"


def test_patcher_core_needs_no_torch(repository: Path) -> None:
    for module, path in package_modules(repository, "blt_patcher").items():
        if module.split(".")[-1] in ENTROPY_MODULES:
            continue
        roots = {name.split(".")[0] for name in imported(path, top_level_only=False)}
        assert not roots & {"torch", "blt_model"}, module


@pytest.mark.parametrize("package", ALLOWED)
def test_no_circles(package: str, repository: Path) -> None:
    modules = package_modules(repository, package)
    # A package's __init__ gathers its modules, so an edge to it is an edge to nothing new.
    edges = {
        module: {name for name in imported(path, top_level_only=True) if name in modules and name != package}
        for module, path in modules.items()
        if module != package
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circular import: {' -> '.join((*trail, module))}"
        if module not in done:
            for target in edges.get(module, ()):
                if not module.startswith(f"{target}."):
                    visit(target, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())
