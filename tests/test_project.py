"""What a newcomer relies on: the lock holds what pyproject asks, without CUDA; notebooks are stored without outputs; no cycles."""

import ast
import hashlib
import json
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.specifiers import SpecifierSet

import lib

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_lock_pins_every_dependency_and_no_cuda():
    for requirement in PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["test"]:
        name = re.match(r"[\w.-]+", requirement)[0]
        assert re.search(rf"^{name}==", LOCK, re.MULTILINE | re.IGNORECASE), name
    assert not re.search(r"^(nvidia|triton|cuda|--|.*://)", LOCK, re.MULTILINE)


def test_the_conda_environment_installs_the_lock():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert conda["name"] == PROJECT["project"]["name"]
    python = next(line for line in conda["dependencies"] if str(line).startswith("python="))
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["project"]["requires-python"])
    assert {"pip": ["-r requirements.lock", "-e ."]} in conda["dependencies"]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and path.name != "00_quickstart.ipynb":
            assert not cell.outputs and cell.execution_count is None


@pytest.mark.parametrize("record", sorted((ROOT / "figures").glob("*.json")), ids=lambda path: path.stem)
def test_a_figure_in_the_repository_is_the_one_its_record_describes(record):
    facts = json.loads(record.read_text())
    assert facts["csv_sha256"] == hashlib.sha256(record.with_suffix(".csv").read_bytes()).hexdigest()
    assert facts["run"]["model"] and "seed" in facts["run"] and facts["caption"]
    assert record.with_suffix(".pdf").stat().st_size and record.with_suffix(".png").stat().st_size


def test_the_readme_imports_what_there_is():
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    names = {alias.name for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names and names <= set(lib.__all__)


def imports(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {name for node in nodes for name in ([node.module] if node.module else [alias.name for alias in node.names])}


def test_modules_import_in_one_direction():
    modules = {path.stem: imports(path) for path in (ROOT / "lib").glob("*.py") if not path.stem.startswith("__")}
    done = set()
    while ready := {name for name, needs in modules.items() if name not in done and (needs & modules.keys()) <= done}:
        done |= ready
    assert done == modules.keys(), f"a cycle among {sorted(modules.keys() - done)}"


def test_nothing_is_unpickled_and_no_remote_code_runs():
    forbidden = r"trust_remote_code\s*=\s*True|torch\.load\(|(import|from) +(c?pickle|dill|joblib|cloudpickle)"
    for path in (ROOT / "lib").rglob("*.py"):
        assert not re.search(forbidden, path.read_text()), path
