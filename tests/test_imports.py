"""The layout: no import cycle, imports point down, file names appear once, rooms stay small."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From top to bottom; a room imports only rooms of lower layers, and of its own layer without a cycle.
LAYERS = [
    {"cli", "__main__"},
    {"predict", "evaluation"},
    {"cards", "hub", "meta_learning", "tasks"},
    {"prediction", "recording", "plotting"},
    {"predictors", "trajectory"},
    {"known"},
]
PLOTTING_USERS = {"cli", "predict", "evaluation", "tasks", "plotting"}


def modules(folder: Path, package: str) -> dict[str, Path]:
    """Every module below a folder, by its dotted name."""
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        names[".".join(filter(None, [package, *(part for part in parts if part != "__init__")]))] = path
    return names


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that a module imports anywhere: at the top, in functions and for type checking only."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    targets = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            targets |= {
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in known else source for alias in node.names
            }
    return {target for target in targets if target in known and target != name}


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Groups of modules that import each other, directly or not (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                groups.append(" <-> ".join(sorted(group)))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return groups


def package_graph() -> dict[str, set[str]]:
    known = modules(ROOT / "know_hf", "know_hf")
    graph = {name: imported(name, path, known) for name, path in known.items()}
    for name, targets in graph.items():
        # importing know_hf.a.b runs know_hf/a/__init__.py too, unless the importer lies in know_hf.a
        for target in list(targets):
            parent = target.rpartition(".")[0]
            while parent and parent != "know_hf":
                if not name.startswith(parent):
                    targets.add(parent)
                parent = parent.rpartition(".")[0]
    del graph["know_hf"]  # the public names are imported lazily
    return {name: targets - {"know_hf"} for name, targets in graph.items()}


def test_the_package_has_no_import_cycle():
    assert cycles(package_graph()) == []


@pytest.mark.parametrize("folder", sorted(p.name for p in (ROOT / "recipes").iterdir() if p.is_dir()))
def test_recipes_have_no_import_cycle(folder):
    known = modules(ROOT / "recipes" / folder, "")
    assert cycles({name: imported(name, path, known) for name, path in known.items()}) == []


def test_imports_point_down():
    layer = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    wrong = []
    for name, targets in package_graph().items():
        room = name.split(".")[1]
        for target in targets:
            other = target.split(".")[1]
            if layer.get(other, len(LAYERS)) < layer.get(room, len(LAYERS)):
                wrong.append(f"{name} -> {target}")
            if other == "plotting" and room not in PLOTTING_USERS:
                wrong.append(f"{name} -> {target}")
    assert wrong == []


def test_a_file_name_appears_once():
    names = Counter(path.name for path in (ROOT / "know_hf").rglob("*.py") if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_rooms_stay_small():
    for folder in {path.parent for path in (ROOT / "know_hf").rglob("*.py")}:
        assert len(list(folder.glob("*.py"))) <= 15, folder
