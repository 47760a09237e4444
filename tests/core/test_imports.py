"""The import rules of STYLE: the core runs without Ray, object stores or the reference; `cluster` holds no Python."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
# Packages that must never be imported: those that come later in the data flow, and those the core works without.
FORBIDDEN = {
    "parakeet_core": {"ray", "jobs", "cluster", "tests", "fsspec", "s3fs", "botocore", "pyarrow", "transformers"},
    "jobs": {"cluster", "tests", "transformers"},
}
# Packages of `jobs`, and the modules beside them that packages use. Programs import these; these import no program.
LAYERS = [
    "storage",
    "blocks",
    "worker_end",
    "models",
    "sources",
    "inputs",
    "reading",
    "planning",
    "table",
    "stages",
    "report",
    "config",
    "training",
]
PIPELINE = ["config", "encoder", "ctc", "inference", "words", "decoding", "device", "engine", "transcriber"]


def imported_modules(path) -> set[str]:
    """Full names of the modules imported anywhere in a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_no_forbidden_import_is_written(package):
    files = sorted((REPO / package).rglob("*.py"))
    assert files
    for path in files:
        found = {name.split(".")[0] for name in imported_modules(path)}
        assert not found & FORBIDDEN[package], path


def test_no_forbidden_module_is_loaded():
    """Not even by a third-party package: every module of the core is imported in a fresh interpreter."""
    modules = [
        f"parakeet_core.{path.stem}" for path in (REPO / "parakeet_core").glob("*.py") if path.stem != "__main__"
    ]
    program = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(sorted({FORBIDDEN['parakeet_core']!r} & {{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_steps_import_earlier_steps_only():
    """At module level: `prepare_inference` and `read_source` import their counterparts when they are called."""
    for position, name in enumerate(PIPELINE):
        tree = ast.parse((REPO / "parakeet_core" / f"{name}.py").read_text(encoding="utf-8"))
        imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        later = {f"parakeet_core.{other}" for other in PIPELINE[position + 1 :]}
        assert not imported & later, name


def test_packages_of_jobs_import_earlier_ones_only():
    jobs = REPO / "jobs"
    assert {path.parent.name for path in jobs.glob("*/__init__.py")} <= set(LAYERS)
    for position, layer in enumerate(LAYERS):
        earlier = set(LAYERS[: position + 1])
        files = sorted((jobs / layer).glob("*.py")) or [jobs / f"{layer}.py"]
        for path in files:
            imported = {name.split(".")[1] for name in imported_modules(path) if name.startswith("jobs.")}
            assert imported <= earlier, path


@pytest.mark.parametrize("program", ["jobs.show", "jobs.compact"])
def test_programs_without_a_model_do_not_load_torch(program):
    """Loading torch takes seconds."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {program}; print('torch' in sys.modules)"],
        cwd=REPO, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "False"


def test_cluster_holds_no_python():
    assert not list((REPO / "cluster").rglob("*.py"))
