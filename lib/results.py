"""The store of measurements that notebooks read: computed once, kept under what went in, continued after a kill.

    ladder = sweep("ladder", refusal_rate, [dict(layer=l) for l in range(30)], lm=lm, prompts=prompts, seed=0)

calls `refusal_rate(layer=0, lm=lm, prompts=prompts, seed=0)` and so on, once for each layer in the life of the store.
The key is made of everything the function receives and of the code it reaches (identity.py): nothing to invalidate,
nothing to forget. The store is data/results, or the folder in $MDLM_RESULTS. With MDLM_FORCE=1 what it holds is
measured again.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm  # not tqdm.auto: a widget would not survive in an executed notebook

from .files import atomic
from .identity import canonical, code_of, digest, identity, plain
from .paths import DATA

try:
    import fcntl
except ImportError:  # Windows: two processes may then measure the same twice, and the last one is kept
    fcntl = None


def cached(name: str, function: Callable, /, **inputs):
    """What `function(**inputs)` returned: a DataFrame, a dict of tensors, or JSON; computed only if the store lacks it.

    It is kept as <name>-<key>.parquet, .safetensors or .json, with the inputs and code identities inside. The value
    always comes from the file, so that the first call returns just what later ones do (tuples become lists). Raises
    TypeError for inputs without an identity and results of other kinds; ValueError for a function outside a package.
    """
    stem, origin = _entry(name, function, inputs)
    if (path := _kept(stem)) is None:
        with _journal(stem) as journal:
            if (path := _kept(stem)) is None:  # else the process we waited for has made it
                path = _save(stem, function(**inputs), origin)
            journal.truncate(0)
    return _load(path)


def sweep(name: str, function: Callable, cells: Sequence[Mapping], /, **inputs):
    """Rows of `function(**cell, **inputs)` (a dict, or a list of dicts) for each cell: a DataFrame in their order.

    Each row starts with its cell's columns. A finished cell is on disk at once: a killed sweep continues with the cells
    it lacks, and a longer list of cells measures only the new ones. A parquet file holds all cells measured so far
    under these inputs. Raises RuntimeError, naming the cell, when the function fails: earlier cells are kept. Raises
    ValueError for repeated cells.
    """
    listed = plain(list(cells), "cells")
    cells = {canonical(cell): cell for cell in listed}
    if len(cells) < len(listed):
        raise ValueError(f"{name}: {len(listed) - len(cells)} of {len(listed)} cells are repeated")
    stem, origin = _entry(name, function, inputs)
    path = _with_suffix(stem, ".parquet")
    if _kept(stem) is None or not cells.keys() <= _read_rows(path)[0]:
        with _journal(stem) as journal:
            kept, frames = _read_rows(path) if _kept(stem) else (set(), [])
            measured = _resumed(journal)
            missing = [key for key in cells if key not in kept and key not in measured]
            for key in _progress(missing, name, len(cells)):
                measured[key] = _measure(name, function, cells[key], inputs)
                journal.write(json.dumps([key, measured[key]]).encode() + b"\n")
                journal.flush()
                os.fsync(journal.fileno())
            _write_rows(path, kept, frames, measured, origin)
            journal.truncate(0)
    return _rows_of(path, list(cells))


def key(function: Callable, /, **inputs) -> str:
    """The 12 hex digits under which `cached` and `sweep` keep `function(**inputs)`."""
    return digest(_origin(function, inputs))[:12]


def store() -> Path:
    """The folder of results: $MDLM_RESULTS, else data/results."""
    return Path(os.environ.get("MDLM_RESULTS") or DATA / "results")


# --- entries ----------------------------------------------------------------------------------------------------------


def _entry(name: str, function: Callable, inputs: Mapping) -> tuple[Path, dict]:
    """Path of an entry without its suffix, and what the entry is made from."""
    if not re.fullmatch(r"[a-z0-9]+([._-][a-z0-9]+)*", name):
        raise ValueError(f"name {name!r}; use lower-case letters and digits, joined by - _ or .: it names a file")
    origin = _origin(function, inputs)
    return store() / f"{name}-{digest(origin)[:12]}", origin


def _origin(function: Callable, inputs: Mapping) -> dict:
    return {
        "code": code_of(function),
        "function": f"{function.__module__}.{function.__qualname__}",
        "inputs": {argument: identity(value, argument) for argument, value in inputs.items()},
    }


def _with_suffix(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)  # Path.with_suffix would cut a name at its last dot


def _kept(stem: Path) -> Path | None:
    if os.environ.get("MDLM_FORCE") == "1":
        return None
    paths = (_with_suffix(stem, suffix) for suffix in (".parquet", ".safetensors", ".json"))
    return next((path for path in paths if path.exists()), None)


def _save(stem: Path, value, origin: dict) -> Path:
    torch, pandas = sys.modules.get("torch"), sys.modules.get("pandas")  # whoever made such a value has loaded them
    if pandas and isinstance(value, pandas.DataFrame):
        return _write_parquet(_with_suffix(stem, ".parquet"), value, origin=origin)
    if torch and isinstance(value, dict) and value and all(isinstance(item, torch.Tensor) for item in value.values()):
        from safetensors.torch import save_file

        layout = torch.contiguous_format  # and clones, since safetensors takes no two tensors that share memory
        tensors = {name: tensor.detach().cpu().clone(memory_format=layout) for name, tensor in value.items()}
        with atomic(path := _with_suffix(stem, ".safetensors")) as temporary:
            save_file(tensors, temporary, {"origin": json.dumps(origin)})
        return path
    kept = {"origin": origin, "value": plain(value, f"the result of {origin['function']}")}
    with atomic(path := _with_suffix(stem, ".json")) as temporary:
        temporary.write_text(json.dumps(kept, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def _load(path: Path):
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))["value"]
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import pandas

    return pandas.read_parquet(path)


def _write_parquet(path: Path, frame, **metadata) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pandas(frame)
    notes = {name: json.dumps(value) for name, value in metadata.items()}
    with atomic(path) as temporary:
        pyarrow.parquet.write_table(table.replace_schema_metadata({**table.schema.metadata, **notes}), temporary)
    return path


# --- sweeps -----------------------------------------------------------------------------------------------------------


def _measure(name: str, function: Callable, cell: dict, inputs: Mapping) -> list[dict]:
    try:
        rows = function(**cell, **inputs)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"{name}: cell {canonical(cell)} failed (earlier ones are kept): {told}") from error
    rows = plain([rows] if isinstance(rows, Mapping) else rows, f"{name}: the result for cell {canonical(cell)}")
    return [{**cell, **row} for row in rows]


def _progress(missing: list[str], name: str, total: int) -> Iterator[str]:
    """The cells to measure, with a bar that counts the kept ones as done; calm where each refresh would be a line."""
    interval, done = 0.1 if sys.stderr.isatty() else 10, total - len(missing)
    return tqdm(missing, name, total, unit="cell", initial=done, mininterval=interval, disable=not missing)


@contextmanager
def _journal(stem: Path) -> Iterator[BinaryIO]:
    """The open journal of an entry: a line for each finished cell. Ours alone until the block ends; others wait here.

    An empty journal is removed at the end, one with cells in it stays for the next process to resume.
    """
    path = _with_suffix(stem, ".partial.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+b")
        _lock(file)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break
        file.close()  # the process we waited for has removed it
    try:
        yield file
    finally:
        done = os.fstat(file.fileno()).st_size == 0
        if fcntl is None:
            file.close()  # Windows removes no open file; elsewhere it goes while locked, so that nobody resumes it
        if done:
            path.unlink(missing_ok=True)
        file.close()


def _lock(file: BinaryIO) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that is measuring {Path(file.name).name.split('.')[0]}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks: as on Windows


def _resumed(journal: BinaryIO) -> dict[str, list[dict]]:
    """Rows by cell; from the first unreadable line on (a kill tears the last one) the journal is cut off."""
    measured, good = {}, 0
    journal.seek(0)
    for line in journal if os.environ.get("MDLM_FORCE") != "1" else ():
        try:
            key, rows = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        measured[key] = rows
        good += len(line)
    journal.truncate(good)
    return measured


def _read_rows(path: Path) -> tuple[set[str], list]:
    """Keys of the cells that a sweep's file holds, and its table."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return set(json.loads(table.schema.metadata[b"cells"])), [table.to_pandas()]


def _write_rows(path: Path, kept: set[str], frames: list, measured: dict[str, list[dict]], origin: dict) -> None:
    import pandas

    fresh = [{"_cell": key, **row} for key, rows in measured.items() if key not in kept for row in rows]
    frames = [frame for frame in (*frames, pandas.DataFrame(fresh)) if len(frame)]
    table = pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame({"_cell": []})
    _write_parquet(path, table, origin=origin, cells=sorted(kept | measured.keys()))


def _rows_of(path: Path, keys: list[str]):
    import pandas

    table = pandas.read_parquet(path)
    rank = table["_cell"].map({key: i for i, key in enumerate(keys)}).dropna()
    return table.loc[rank.sort_values(kind="stable").index].drop(columns="_cell").reset_index(drop=True)
