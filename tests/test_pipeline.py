"""Running notebooks: strict parameters, reasons for staleness, and a true record of success and failure.

The notebooks are tiny and made here; the repository they belong to is a folder of the test. Each kernel costs seconds,
so the tests that only look at what was run share one run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat.v4
import pytest

from lib.__main__ import main
from lib.pipeline import run
from lib.planning import plan, resolve_model
from lib.studies import UserError

PARAMETERS = """\
model: str = "smol-mdlm"
seed: int = 0
strength: float = 1.0  # in units of the norm: h += strength * v
layers: list[int] = [1, 2]
note: str | None = None
"""
FIGURE = """
import os, pathlib
for suffix in ("pdf", "png", "csv", "json"):
    path = pathlib.Path(os.environ["MDLM_FIGURES"], f"curve.{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(repr([model, seed, strength, layers, note, os.getcwd()]))
"""
LATER = """
import os
from ipykernel.connect import get_connection_info
assert os.path.exists(os.path.join(os.environ["MDLM_FIGURES"], "curve.pdf")), "runs after the study that it builds on"
assert "ipc" in get_connection_info(), "no ports, no warning about them"
"""
STUDIES = {
    "good": ('title = "Good"\nfigures = ["curve"]\nsmoke = {layers = [1]}\n', ["from lib.steering import V", FIGURE]),
    "bad": ('title = "Raises"\nminutes = {cpu = 0.1}\n', ["1 / 0"]),
    "after-bad": ('title = "Never reached"\nafter = ["bad"]\n', ["print(1)"]),
    "after-good": (
        'title = "Later"\nafter = ["good"]\n',
        [LATER],
    ),
    "dead": ('title = "Dies"\n', ["import os", "os._exit(0)"]),
    "leaves": ('title = "Leaves early"\n', ["import sys\nsys.exit(0)", "print('unreached')"]),
    "figureless": ('title = "Promises a figure"\nfigures = ["promised"]\n', ["print(1)"]),
}


def write_notebook(path: Path, cells: list[str], parameters: str | None = PARAMETERS) -> None:
    tagged = [] if parameters is None else [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    plain = [nbformat.v4.new_code_cell(cell) for cell in cells]
    metadata = {"kernelspec": {"name": "some-other-kernel", "display_name": "other", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), *tagged, *plain], metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def write_repository(root: Path, *names: str) -> Path:
    """A repository with some of STUDIES, in their order."""
    for file, text in {
        "lib/__init__.py": "",
        "lib/steering.py": "from .hooking import V\n",
        "lib/hooking.py": "V = 1\n",
        "lib/unrelated.py": "",
        "data/prompts/contrast.jsonl": "{}\n",
        "data/models/smol-mdlm/config.json": "{}",
        "requirements.lock": "torch==2.13.0\n",
    }.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    entries = []
    for name in names:
        settings, cells = STUDIES[name]
        entries.append(f'[{name}]\nnotebook = "{name}.ipynb"\n{settings}')
        write_notebook(root / "notebooks" / f"{name}.ipynb", cells)
    (root / "notebooks" / "studies.toml").write_text("\n".join(entries))
    return root


def record_of(root: Path, study: str, folder: str = "runs/notebooks") -> dict:
    return json.loads((root / folder / "smol-mdlm" / f"{study}.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A repository after a run of all STUDIES, two at a time, and the status of that run."""
    root = write_repository(tmp_path_factory.mktemp("repository {0}"), *STUDIES)
    return root, run(jobs=2, root=root, parameters={"note": "中文 {x}", "seed": 7})


@pytest.fixture
def repository(tmp_path):
    return write_repository(tmp_path, "good", "after-good")


@pytest.fixture
def copy(done, tmp_path):
    """A copy of the finished repository, for a test to change."""
    return Path(shutil.copytree(done[0], tmp_path / "copy"))


def reasons(root: Path, study: str = "good", **options) -> tuple[str, ...]:
    options = {"parameters": {"note": "中文 {x}", "seed": 7}} | options
    return next(run.reasons for run in plan(root, only=[study], **options))


# --- what became of it ------------------------------------------------------------------------------------------------


def test_a_good_notebook_is_recorded_with_all_that_made_it(done):
    root, status = done
    assert status == 1  # others failed
    record = record_of(root, "good")
    assert (record["status"], record["seed"], record["profile"]) == ("ok", 7, "cpu")
    assert set(record["identity"]["code"]) == {"lib/steering.py", "lib/hooking.py"}
    assert record["versions"]["papermill"] and record["seconds"] > 0 and record["git"] is None
    executed = nbformat.read(root / "runs/notebooks/smol-mdlm/good.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    values = (root / "figures/curve.csv").read_text()
    assert values == repr(["smol-mdlm", 7, 1.0, [1, 2], "中文 {x}", str(root)])


def test_no_litter_is_left(done):
    root, _ = done
    assert not [path.name for path in root.rglob(".*")]


@pytest.mark.parametrize(
    ("study", "error"),
    [
        ("bad", "cell 4: ZeroDivisionError: division by zero"),
        ("dead", "cell 5: DeadKernelError: Kernel died"),
        ("leaves", "it ended before cell 5 (exit() in a cell?)"),
        ("figureless", "it has not made promised.pdf, promised.png, promised.csv, promised.json"),
    ],
)
def test_failures_are_seen_and_recorded(done, study, error):
    root, _ = done
    record = record_of(root, study)
    assert (record["status"], record["error"]) == ("failed", error)
    folder = root / "runs/notebooks/smol-mdlm"
    assert (folder / f"{study}.failed.ipynb").exists() and not (folder / f"{study}.ipynb").exists()
    (again,) = plan(root, only=[study], parameters={"note": "中文 {x}", "seed": 7})
    assert (again.state, again.reasons) == ("failed", (f"last run failed ({error})",))


def test_a_failure_stops_what_builds_on_it_and_nothing_else(done):
    root, _ = done
    assert not (root / "runs/notebooks/smol-mdlm/after-bad.json").exists()
    assert record_of(root, "after-good")["status"] == "ok"


# --- why it is stale --------------------------------------------------------------------------------------------------


def test_nothing_changed_nothing_runs(copy, capsys):
    assert reasons(copy) == ()
    assert run(only=["good", "after-good"], parameters={"note": "中文 {x}", "seed": 7}, root=copy) == 0
    assert "0 of 2 notebooks to run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("lib/hooking.py", "lib/hooking.py changed"),
        ("data/prompts/contrast.jsonl", "data/prompts/contrast.jsonl changed"),
        ("data/prompts/new.jsonl", "data/prompts/new.jsonl added"),
        ("data/models/smol-mdlm/config.json", "model weights changed"),
        ("requirements.lock", "lock file changed"),
    ],
)
def test_a_changed_file_is_a_reason(copy, file, reason):
    (copy / file).write_text("V = 2\n")
    assert reasons(copy) == (reason,)


def test_what_does_not_matter_is_no_reason(copy):
    (copy / "lib/unrelated.py").write_text("V = 2\n")
    (copy / "data/models/smol-mdlm/README.md").write_text("A card.")
    (copy / "data/prompts/README.md").write_text("A note.")
    (copy / "lib/hooking.py").write_text('"""Explained."""\n\nV = 1  # one\n')
    path = copy / "notebooks/good.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1] |= {"execution_count": 3, "outputs": [nbformat.v4.new_output("stream", text="seen")]}
    nbformat.write(notebook, path)
    assert reasons(copy) == ()


def test_a_changed_notebook_is_a_reason_for_later_studies_too(copy):
    write_notebook(copy / "notebooks/good.ipynb", [FIGURE])
    assert reasons(copy) == ("notebook changed", "lib/hooking.py removed", "lib/steering.py removed")
    assert reasons(copy, "after-good") == ("study good changed",)


def test_changed_parameters_are_told_with_both_values(copy):
    assert reasons(copy, parameters={"seed": 8}) == ("parameter note: '中文 {x}' -> None", "parameter seed: 7 -> 8")


def test_missing_outputs_and_force_are_reasons(copy):
    (copy / "figures/curve.png").unlink()
    (copy / "runs/notebooks/smol-mdlm/good.ipynb").unlink()
    assert reasons(copy, force=True) == ("good.ipynb is missing", "curve.png is missing", "forced")


def test_a_run_that_did_not_finish_is_stale(copy):
    path = copy / "runs/notebooks/smol-mdlm/good.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "unfinished"}))
    assert reasons(copy) == ("last run did not finish",)


# --- parameters and studies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"strenght": 1.0}, "unknown parameter 'strenght'; did you mean 'strength'?"),
        ({"strength": "1.0"}, "strength = '1.0' is a str; it must be float"),
        ({"seed": 1.0}, "seed = 1.0 is a float; it must be int"),
        ({"seed": True}, "seed = True is a bool; it must be int"),
        ({"layers": [1, "2"]}, r"layers = \[1, '2'\] is a list; it must be list\[int\]"),
        ({"layers": None}, "it must be list"),
        ({"note": 1}, r"it must be str \| None"),
        ({"model": "smol-ar"}, "with --model"),
    ],
)
def test_misspelt_and_mistyped_parameters_are_refused(repository, parameters, message):
    with pytest.raises(UserError, match=message):
        plan(repository, parameters=parameters)


def test_fitting_values_are_taken(repository):
    (planned, _) = plan(repository, parameters={"strength": 2, "layers": (), "note": "x"}, profile="smoke")
    assert planned.parameters == {"strength": 2, "layers": [], "note": "x", "model": "smol-mdlm"}


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, 'no code cell tagged "parameters"'),
        ("model: str = 'a'", "lacks `seed: int`"),
        ("model: str = 'a'\nseed = 1", "has `seed = 1`; each line must be name: type = literal"),
        ("model: str = 'a'\nseed: int = 1 + x", "each line must be"),
        ("model: str = 'a'\nseed: int = None", "seed = None is a NoneType; it must be int"),
        ("model: str = 'a'\nseed: Integer = 1", "with a type made of int, float"),
        ("model: str = 'a'\nseed: int = ", "parameters cell, line 2"),
    ],
)
def test_a_parameters_cell_is_a_contract(repository, cell, message):
    write_notebook(repository / "notebooks/good.ipynb", [], cell)
    with pytest.raises(UserError, match=message):
        plan(repository)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("afer = []", r"unknown key in studies.toml \[last\] 'afer'; did you mean 'after'"),
        ('after = ["god"]', "'god'; did you mean 'good'"),
        ('after = ["last"]', "a study stands below those it builds on"),
        ("minutes = 3", "minutes = 3 must be a dict"),
        ("cpu = {strenght = 1.0}", "did you mean 'strength'"),
        ('cpu = {model = "smol-ar"}', "chosen when the notebooks are run"),
    ],
)
def test_malformed_studies_are_refused(repository, line, message):
    with (repository / "notebooks/studies.toml").open("a") as file:
        file.write(f'[last]\nnotebook = "good.ipynb"\ntitle = "Last"\n{line}\n')
    with pytest.raises(UserError, match=message):
        plan(repository)


def test_models_have_names_for_files(repository, tmp_path):
    model = tmp_path / "my model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    name, slug, before = resolve_model(repository, str(model))
    assert name == str(model) and slug.startswith("my--model-") and "/" not in slug
    (model / "config.json").write_text("{ }")
    assert resolve_model(repository, str(model))[2] != before
    assert resolve_model(repository, "GSAI-ML/LLaDA-8B-Base")[1] == "GSAI-ML--LLaDA-8B-Base"
    with pytest.raises(UserError, match="no model directory"):
        resolve_model(repository, str(tmp_path / "nowhere"))


def test_places_keep_profiles_and_models_apart(repository, tmp_path):
    folders = {
        (planned.figures.relative_to(tmp_path).as_posix(), planned.results.relative_to(tmp_path).as_posix())
        for options in ({}, {"profile": "smoke"}, {"out": tmp_path / "o"}, {"models": ["smol-mdlm", "a/b"]})
        for planned in plan(repository, **options)
    }
    assert folders == {
        ("figures", "data/results"),
        ("runs/smoke/figures", "runs/smoke/results"),
        ("o/figures", "o/results"),
        ("figures/a--b", "data/results"),
    }


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line_tells_what_would_run(repository, capsys):
    assert main(["status", "--only", "good", "-p", "note=two words"], root=repository) == 0
    assert main(["run", "--dry-run", "--profile", "smoke", "-p", "layers=[3, 4]"], root=repository) == 0
    told = capsys.readouterr().out
    assert "good   smol-mdlm  would run  never run" in told and "2 of 2 notebooks to run, about 2 min" in told
    assert not (repository / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--only", "god"], "unknown study 'god'; did you mean 'good'?"),
        (["run", "--profile", "gpu"], "unknown profile 'gpu'"),
        (["run", "--jobs", "0"], "at least one notebook"),
        (["run", "-p", "seed"], "write -p name=value"),
        (["status", "-p", "seed=x"], "seed = 'x' is a str; it must be int"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(repository, capsys, arguments, message):
    assert main(arguments, root=repository) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and message in told.err and told.err.count("\n") == 1


def test_an_interrupt_stops_kernels_and_leaves_nothing_half_written(tmp_path):
    root = write_repository(tmp_path, "good")
    waits = "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)"
    write_notebook(root / "notebooks/good.ipynb", [waits])
    code = f"import sys, pathlib, lib.__main__\nsys.exit(lib.__main__.main(['run'], root=pathlib.Path({str(root)!r})))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (root / "pid").exists() or not (root / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    kernel = int((root / "pid").read_text())
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=20)[1].decode()
    assert process.returncode == 130 and "interrupted" in told and "Traceback" not in told, told
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(kernel, 0)
            time.sleep(0.05)
    assert sorted(path.name for path in (root / "runs").rglob("*") if path.is_file()) == ["good.json"]
    assert reasons(root, parameters={}) == ("last run did not finish",)
