"""Holds the source to CONTRIBUTING's table: who imports whom, and what lies where."""

import ast
import pathlib
import re
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "shallow_pi"

# Bottom first: a file imports only from files before it. CONTRIBUTING.md holds the same table.
FOLDERS = {
    "": ["progress", "figures", "user_cache"],
    "models/": [
        "observation",
        "layers",
        "attention",
        "gemma",
        "siglip",
        "image_tower",
        "pi0",
        "prepare",
        "tuning",
        "inference",
        "real_time",
        "sampler",
        "fetch",
        "lora",
        "safetensors_layout",
        "safetensors_file",
        "weights",
        "sizes",
    ],
    "data/": [
        "normalize",
        "tokenizer",
        "transforms",
        "conversions",
        "robots",
        "pipelines",
        "statistics",
        "video",
        "video_writer",
        "lerobot_layout",
        "lerobot",
        "lerobot_stats",
        "lerobot_tables",
        "lerobot_writer",
        "hub",
        "sources",
        "frame_cache",
        "loader",
        "assets",
    ],
    "distill/": ["flow", "layer_map", "student", "layer_scores", "losses", "norms", "step"],
    "training/": [
        "optimizer",
        "sharding",
        "roll_call",
        "distributed",
        "checkpoint",
        "run_folder",
        "agreement",
        "metrics",
        "rows",
        "profiling",
        "batches",
        "data_check",
        "data_sheet",
        "shapes",
        "cards",
        "memory",
        "validation",
        "config",
        "command_line",
        "setup",
        "loop",
        "hlo",
        "ahead",
    ],
    "deploy/": [
        "robot_observation",
        "step_folder",
        "likely_shapes",
        "previous_chunk",
        "policy",
        "executors",
        "protocol",
        "recorder",
        "server_config",
        "telemetry",
        "live",
        "routes",
        "viewers",
        "sessions",
        "server",
        "lerobot_folder",
        "model_card",
        "export",
    ],
    "evaluation/sims/": [
        "simulator",
        "raycast",
        "turntable_scene",
        "turntable",
        "turntable_expert",
    ],
    "evaluation/": [
        "intervals",
        "late_plans",
        "rollout",
        "latency",
        "actors",
        "flops",
        "benchmark",
        "step_benchmark",
        "tuner",
        "plots",
        "speed_plots",
        "held_out",
        "report",
        "study",
    ],
    "interop/": ["openpi", "openpi_data", "openpi_configs"],
}
ORDER = [folder + file for folder, files in FOLDERS.items() for file in files]

# Import name → name in pyproject.toml, where they differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
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


def test_every_file_has_its_place_in_the_order():
    names = {name_of(path) for path in SOURCES if path.name != "__init__.py"}
    assert not names - set(ORDER), "add the file where its row belongs, here and in CONTRIBUTING.md"


def test_contributing_holds_the_same_table():
    rows = re.findall(
        r"^\| (\(package\)|`[a-z/]+`) \|([^|]*)\|",
        (ROOT / "CONTRIBUTING.md").read_text(),
        re.MULTILINE,
    )
    written = {
        folder.strip("`").replace("(package)", ""): re.findall(r"`(\w+)`", files)
        for folder, files in rows
    }
    assert list(written.items()) == list(FOLDERS.items())


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path):
    if path.name == "__init__.py":
        (docstring,) = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr), f"{path} holds more than a docstring"
        return
    name = name_of(path)
    before = ORDER[: ORDER.index(name)]
    assert not [other for other in ours(path) if other not in before]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_deploy_needs_models_and_data_alone(path):
    if name_of(path).startswith("deploy/"):
        found = {other.split("/")[0] for other in ours(path)}
        assert found <= {"models", "data", "deploy", "progress"}


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
    for path in [*SOURCES, *ENTRY_POINTS]:
        for module, lazy in imports(path):
            root = module.split(".")[0]
            if root in sys.stdlib_module_names or root in {"shallow_pi", "_base"}:
                continue
            if path.parent.name == "interop" and root in {"openpi", "openpi_client", "lerobot"}:
                continue
            distribution = DISTRIBUTIONS.get(root, root).lower()
            declared = required | optional if lazy else required
            assert distribution in declared, f"{path} imports {module}: declare it"


def test_the_whole_config_is_seen_by_the_host_side_alone():
    allowed = {"training/config", "training/setup", "training/loop", "evaluation/study"}
    allowed |= {"interop/openpi_configs", "training/command_line"}
    for path in SOURCES:
        named = {
            getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
            for node in ast.walk(ast.parse(path.read_text()))
        }
        assert "DistillConfig" not in named or name_of(path) in allowed, path


@pytest.mark.parametrize("path", [*SOURCES, *ENTRY_POINTS], ids=lambda path: path.stem)
def test_files_are_short_and_say_what_they_are_for(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350, f"{path} is asking to be two files"
    assert ast.get_docstring(ast.parse(text)), f"{path} opens without a docstring"
    assert path.stem not in {"utils", "common", "helpers", "misc"}


def test_readme_maps_every_file():
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"^## File map\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section, "README.md has no section '## File map'"
    blocks = re.findall(r"^```\w*\n(.*?)^```", section.group(1), re.MULTILINE | re.DOTALL)
    named = {line.split()[0] for block in blocks for line in block.splitlines() if line.strip()}
    assert not {name for name in named if not (ROOT / name).exists()}, "named but absent"
    files = [path for path in [*SOURCES, *ENTRY_POINTS] if path.name != "__init__.py"]
    assert not {path.relative_to(ROOT).as_posix() for path in files} - named, "not in the map"
