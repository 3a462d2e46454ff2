"""The store of results: what is a hit, what is a miss, and that nothing finished is lost. It measures a toy package."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import pytest

from lib import identity, results
from lib.files import atomic

MEASURE = """
    import os, time
    from pathlib import Path
    from .deep import scale

    CALLS = []

    def table(n, factor=1.0):
        import pandas as pd
        CALLS.append(n)
        return pd.DataFrame({"x": range(n), "y": [scale(i, factor) for i in range(n)], "who": ["甲"] * n})

    def facts(**inputs):
        CALLS.append(inputs)
        return {"inputs": sorted(inputs), "pair": (1, 2.5), "nothing": None}

    def tensors():
        import torch
        whole = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
        return {"whole": whole, "transposed": whole.T}

    def unfit():
        return {1, 2}

    def cell(layer, alpha, bad=None, slow=None):
        CALLS.append((layer, alpha))
        if slow and layer == 2 and not Path(slow).exists():
            Path(slow).touch()
            time.sleep(60)
        if layer == bad:
            raise ZeroDivisionError("no such layer")
        return [{"token": i, "rate": scale(layer + i, alpha)} for i in range(layer)]

    def pid(i):
        time.sleep(0.05)
        return {"pid": os.getpid(), "value": i / 3}
"""
CELLS = [{"layer": layer, "alpha": alpha} for layer in (3, 1, 2) for alpha in (0.1, 1.0)]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package of two modules on the path, with a store of its own."""
    package = tmp_path / "toy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "deep.py").write_text("def scale(x, by):\n    return x * by\n")
    (package / "aside.py").write_text("def scale(x):\n    return x\n")
    (package / "measure.py").write_text(textwrap.dedent(MEASURE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MDLM_RESULTS", str(tmp_path / "store"))
    monkeypatch.delenv("MDLM_FORCE", raising=False)
    yield __import__("toy.measure").measure
    for name in [name for name in sys.modules if name.split(".")[0] == "toy"]:
        del sys.modules[name]


def files(toy_path):
    return sorted(path.name for path in (toy_path / "store").iterdir())


# --- cached -----------------------------------------------------------------------------------------------------------


def test_a_table_is_computed_once_and_comes_back_equal(toy, tmp_path):
    first = results.cached("a-table", toy.table, n=3)
    second = results.cached("a-table", toy.table, n=3)
    assert toy.CALLS == [3]
    pd.testing.assert_frame_equal(first, second)
    pd.testing.assert_frame_equal(first, toy.table(3))
    assert files(tmp_path) == [f"a-table-{results.key(toy.table, n=3)}.parquet"]


def test_json_is_what_a_file_holds_from_the_first_call_on(toy):
    first = results.cached("facts", toy.facts, a=1)
    assert first == results.cached("facts", toy.facts, a=1) == {"inputs": ["a"], "pair": [1, 2.5], "nothing": None}
    assert len(toy.CALLS) == 1


def test_tensors_keep_dtype_and_values(toy):
    torch = pytest.importorskip("torch")
    for _ in range(2):
        kept = results.cached("tensors", toy.tensors)
        assert kept["whole"].dtype == torch.bfloat16
        assert torch.equal(kept["transposed"], toy.tensors()["transposed"])


def test_a_result_that_cannot_be_kept_names_the_function_and_leaves_nothing(toy, tmp_path):
    with pytest.raises(TypeError, match=r"result of toy\.measure\.unfit is a set"):
        results.cached("unfit", toy.unfit)
    assert files(tmp_path) == []


def test_every_input_counts_exactly(toy):
    values = [
        1,
        2,
        "1",
        1.0,
        True,
        None,
        [1, 2],
        {"b": 1},
        0.1 + 0.2,
        0.3,
        slice(1),
        toy.table,
        np.arange(3),
        np.ones(3),
    ]
    keys = {results.key(toy.facts, a=value) for value in values} | {results.key(toy.facts, b=1)}
    assert len(keys) == len(values) + 1
    assert results.key(toy.facts, a=(1, np.int64(2)), b=np.float32(0.5)) == results.key(toy.facts, a=[1, 2], b=0.5)


def test_tensors_and_directions_count_by_content(toy):
    torch = pytest.importorskip("torch")
    from dataclasses import dataclass
    from types import SimpleNamespace

    @dataclass(frozen=True)
    class Direction:
        basis: torch.Tensor
        fingerprint: str = "of the weights it belongs to"

    one, other = Direction(torch.ones(1, 4)), Direction(torch.zeros(1, 4))
    assert results.key(toy.facts, d=one) == results.key(toy.facts, d=Direction(torch.ones(1, 4)))
    assert results.key(toy.facts, d=one) != results.key(toy.facts, d=other)
    half = SimpleNamespace(fingerprint="abc", model=SimpleNamespace(dtype=torch.bfloat16))
    full = SimpleNamespace(fingerprint="abc", model=SimpleNamespace(dtype=torch.float32))
    assert results.key(toy.facts, lm=half) != results.key(toy.facts, lm=full)
    assert results.key(toy.facts, m=torch.nn.Identity()) != results.key(toy.facts, m=torch.nn.Linear(1, 1))


def test_unfit_inputs_and_functions_are_refused_by_name(toy, tmp_path):
    with pytest.raises(TypeError, match=r"prompts\['train'\]\[1\] is a set"):
        results.cached("facts", toy.facts, prompts={"train": ["a", {"b"}]})
    with pytest.raises(TypeError, match="where has the key 1"):
        results.cached("facts", toy.facts, where={1: 2})

    def here(): ...

    here.__module__ = "__main__"
    with pytest.raises(ValueError, match="move it to a module of lib"):
        results.cached("here", here)
    with pytest.raises(ValueError, match="names a file"):
        results.cached("../here", toy.facts)


def test_force_measures_again(toy, monkeypatch):
    results.cached("a-table", toy.table, n=1)
    results.sweep("ladder", toy.cell, CELLS[:2])
    monkeypatch.setenv("MDLM_FORCE", "1")
    results.cached("a-table", toy.table, n=1)
    results.sweep("ladder", toy.cell, CELLS[:1])
    assert toy.CALLS == [1, (3, 0.1), (3, 1.0), 1, (3, 0.1)]


# --- code -------------------------------------------------------------------------------------------------------------


def test_code_counts_where_it_is_reached_and_comments_never_do(toy, tmp_path):
    deep, aside = tmp_path / "toy" / "deep.py", tmp_path / "toy" / "aside.py"
    before = results.key(toy.table, n=1)
    aside.write_text("def scale(x):\n    return -x\n")
    deep.write_text('"""Now explained."""\n\n# why\ndef scale(x, by):\n\n    """Doc."""\n    return x * by  # times\n')
    assert results.key(toy.table, n=1) == before
    deep.write_text("def scale(x, by):\n    return by * x\n")
    assert results.key(toy.table, n=1) != before


def test_essence_keeps_what_runs():
    source = 'X = """a\n\n# not a comment\nb"""  # one\n\n\ndef f():\n    # two\n    "doc"\n    return f"{X}#"\n'
    assert identity.essence(source) == 'X = """a\n\n# not a comment\nb"""\ndef f():\n    return f"{X}#"'


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from lib import load", {"models.py"}),
        ("from lib.models import load as l", {"models.py"}),
        ("from lib import models", {"models.py"}),
        ("import lib.models", {"models.py"}),
        ("def f():\n    from lib.inner.deep import x", {"inner/deep.py"}),
        ("from lib.inner import deep", {"inner/__init__.py", "inner/deep.py"}),
        ("from lib import passed_on", {"models.py", "steering.py", "inner/__init__.py", "inner/deep.py"}),
        ("import lib", {"models.py", "steering.py", "inner/__init__.py", "inner/deep.py", "__init__.py"}),
        ("import library, json\nfrom json import load", set()),
    ],
)
def test_imports_are_followed_by_syntax(tmp_path, source, expected):
    package = tmp_path / "lib"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__.py", "steering.py", "inner/__init__.py"):
        (package / name).write_text("")
    (package / "models.py").write_text("def load(): ...\n")
    (package / "inner" / "deep.py").write_text("x: int = 1\n")
    found = {path.relative_to(package).as_posix() for path in identity.imported(package, source)}
    assert found - {"__init__.py"} == expected - {"__init__.py"}


def test_relative_imports_start_at_the_folder(tmp_path):
    package = tmp_path / "lib"
    (package / "training").mkdir(parents=True)
    for name in ("__init__.py", "models.py", "training/__init__.py", "training/loop.py"):
        (package / name).write_text("")
    (package / "training" / "main.py").write_text("from ..models import a\nfrom .loop import b\nfrom . import loop\n")
    assert set(identity.code(package, [package / "training" / "main.py"])) == {
        "lib/models.py", "lib/training/__init__.py", "lib/training/loop.py", "lib/training/main.py",
    }  # fmt: skip


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_a_sweep_has_the_cells_rows_in_order(toy, tmp_path):
    table = results.sweep("ladder", toy.cell, CELLS)
    expected = [{**cell, **row} for cell in CELLS for row in toy.cell(**cell)]
    pd.testing.assert_frame_equal(table, pd.DataFrame(expected))
    toy.CALLS.clear()
    pd.testing.assert_frame_equal(results.sweep("ladder", toy.cell, CELLS), table)
    assert toy.CALLS == []
    assert [name.split(".")[-1] for name in files(tmp_path)] == ["parquet"]


def test_a_longer_sweep_measures_only_its_new_cells(toy):
    results.sweep("ladder", toy.cell, CELLS[:4])
    toy.CALLS.clear()
    table = results.sweep("ladder", toy.cell, CELLS[::-1])
    assert toy.CALLS == [(2, 1.0), (2, 0.1)]
    assert table[["layer", "alpha"]].drop_duplicates().to_dict("records") == CELLS[::-1]
    results.sweep("ladder", toy.cell, CELLS[2:5])
    assert len(toy.CALLS) == 2


def test_a_failing_cell_is_named_and_the_earlier_ones_are_kept(toy, tmp_path):
    with pytest.raises(RuntimeError, match=r'cell \{"alpha":0.1,"layer":1\} failed .*ZeroDivisionError: no such layer'):
        results.sweep("ladder", toy.cell, CELLS, bad=1)
    (journal,) = (tmp_path / "store").iterdir()
    assert len(journal.read_text().splitlines()) == 2
    toy.CALLS.clear()
    with pytest.raises(RuntimeError):
        results.sweep("ladder", toy.cell, CELLS, bad=1)
    assert toy.CALLS == [(1, 0.1)]


def test_a_torn_line_is_measured_again(toy, tmp_path):
    with pytest.raises(RuntimeError):
        results.sweep("ladder", toy.cell, CELLS, bad=1)
    (journal,) = (tmp_path / "store").iterdir()
    journal.write_bytes(journal.read_bytes()[:-9])
    toy.CALLS.clear()
    with pytest.raises(RuntimeError):
        results.sweep("ladder", toy.cell, CELLS, bad=1)
    assert toy.CALLS == [(3, 1.0), (1, 0.1)]
    assert [len(json.loads(line)) for line in journal.read_text().splitlines()] == [2, 2]


def test_cells_without_rows_are_done_too(toy):
    empty = [{"layer": 0, "alpha": 0.5}]
    assert results.sweep("ladder", toy.cell, empty).empty
    assert results.sweep("ladder", toy.cell, empty).empty
    assert toy.CALLS == [(0, 0.5)]


def test_repeated_cells_are_refused(toy):
    with pytest.raises(ValueError, match="1 of 3 cells are repeated"):
        results.sweep("ladder", toy.cell, [{"layer": 1}, {"layer": np.int64(1)}, {"layer": 2}])


def script(tmp_path, code):
    """A process with the toy package; SIGKILL leaves it no time to tidy up."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    code = f"from toy import measure\nfrom lib.results import sweep\n{textwrap.dedent(code)}"
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


def test_a_killed_sweep_continues(toy, tmp_path):
    slow = str(tmp_path / "reached")
    process = script(tmp_path, f"sweep('ladder', measure.cell, {CELLS!r}, slow={slow!r})")
    while not os.path.exists(slow) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    table = results.sweep("ladder", toy.cell, CELLS, slow=slow)
    assert toy.CALLS == [(2, 0.1), (2, 1.0)]
    assert table[["layer", "alpha"]].drop_duplicates().to_dict("records") == CELLS


def test_two_processes_at_once_measure_each_cell_once(toy, tmp_path):
    code = "sweep('race', measure.pid, [dict(i=i) for i in range(20)])"
    processes = [script(tmp_path, code) for _ in range(2)]
    told = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    table = results.sweep("race", toy.pid, [{"i": i} for i in range(20)])
    assert table["value"].tolist() == [i / 3 for i in range(20)]
    assert table["pid"].nunique() == 1
    assert [name.split(".")[-1] for name in files(tmp_path)] == ["parquet"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.json"
    with atomic(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text("ne")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
