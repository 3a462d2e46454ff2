"""One notebook, executed in a process of its own, and the record of what became of it.

The record is written last and is all that is believed: an executed notebook looks the same after success, a dead kernel
and a time-out. A notebook that failed is kept as <study>.failed.ipynb. Knows nothing of other notebooks.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

from .files import atomic, git_state, versions
from .planning import Run


@dataclass(frozen=True)
class Settings:
    """What all notebooks of a run share.

    root: the repository, where kernels work. scratch: a folder for their sockets, with a short name. force: measure
    again what the store of results holds. threads: how many each may use; None leaves it to the libraries.
    """

    root: Path
    scratch: Path
    force: bool = False
    threads: int | None = None


class Worker:
    """A process that executes one notebook, and what the main process knows of it.

    messages: where the process says {"cell": "3/12"} or {"progress": text} as it goes, and {"error": text or None} at
    the end. record: what is written beside the executed copy. over: whether the notebook has ended, one way or another.
    """

    def __init__(self, run: Run, settings: Settings):
        self.run, self.started, self.cell, self.over = run, time.time(), "", False
        self.temporary = run.notebook.with_name(f".{run.notebook.stem}.{os.getpid()}.ipynb")
        self.record = {
            "status": "unfinished",
            "study": run.study.id,
            "model": run.model,
            "profile": run.profile,
            "key": run.key,
            "identity": run.identity,
            "seed": run.identity["parameter"]["seed"],
            "git": git_state(settings.root),
            "versions": versions(),
            "start": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._write_record()  # from here on figures are overwritten: the old record no longer tells what they show
        context = multiprocessing.get_context("spawn")
        self.messages, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(run, self.temporary, settings, sender), daemon=True)
        self.process.start()
        sender.close()  # the process alone holds it: its death ends the messages

    def hear(self) -> str:
        """Wait for a message; what it says, for people. The last one, or the death of the process, ends the run."""
        try:
            message = self.messages.recv()
        except EOFError:
            self.process.join()
            message = {"error": f"its process died (exit code {self.process.exitcode})"}
        if "error" in message:
            self._finish(message["error"])
            return self.record["status"]
        self.cell = message.get("cell", self.cell)
        return f"cell {self.cell}" + (f", {message['progress']}" if "progress" in message else "")

    def _finish(self, error: str | None) -> None:
        """Put the executed notebook in its place, then write the record."""
        self.process.join()
        self.over = True
        if error is None and (missing := self.run.missing_figures()):
            error = f"it has not made {', '.join(missing)}"
        failed = self.run.notebook.with_suffix(".failed.ipynb")
        failed.unlink(missing_ok=True)
        if self.temporary.exists():
            os.replace(self.temporary, failed if error else self.run.notebook)
        self.record |= {
            "status": "failed" if error else "ok",
            "error": error,
            "end": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started, 1),
        }
        self._write_record()

    def stop(self) -> None:
        """End the process and its kernel; the record keeps saying that the run did not finish."""
        self.process.terminate()
        self.process.join(10)
        self.process.kill()
        self.process.join()
        self.temporary.unlink(missing_ok=True)

    def _write_record(self) -> None:
        with atomic(self.run.record) as temporary:
            temporary.write_text(json.dumps(self.record, ensure_ascii=False, indent=1), encoding="utf-8")


# --- inside the process -----------------------------------------------------------------------------------------------


def _work(run: Run, output: Path, settings: Settings, messages: Connection) -> None:
    """Execute a notebook in a kernel, telling how it goes (see Worker)."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in the terminal then reaches the main process alone, which stops this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwinds papermill, which ends the kernel
    scratch = settings.scratch / str(os.getpid())
    _set_environment(run, settings, scratch)

    sys.modules["rfc3987_syntax"] = None  # a URI grammar that jsonschema would build for seconds; notebooks need none
    import nbformat
    import papermill
    from ipykernel.kernelspec import write_kernel_spec
    from papermill.log import logger
    from traitlets.config import Config

    logger.setLevel("CRITICAL")  # it warns of parameters that its own inspection has missed, and tells errors twice
    write_kernel_spec(scratch / "kernels" / "python3")  # this Python, whatever "python3" is in the user's Jupyter
    total = len(nbformat.read(run.study.notebook, as_version=4).cells) + 1  # papermill adds the injected parameters
    number = 0

    def on_cell_start(cell, cell_index):
        nonlocal number
        number = cell_index + 1
        if cell.cell_type == "code":
            messages.send({"cell": f"{number}/{total}"})

    try:
        executed = papermill.execute_notebook(
            _escaped(run.study.notebook),
            _escaped(output),
            parameters=run.parameters,
            kernel_name="python3",
            cwd=settings.root,
            progress_bar=False,
            on_cell_start=on_cell_start,
            stderr_file=_BarsOf(messages),
            shutdown_kernel="immediate",
            config=Config({"ConnectionFileMixin": _transport(scratch)}),
        )
        unexecuted = [i for i, cell in enumerate(executed.cells, 1) if _unexecuted(cell)]
        error = f"it ended before cell {unexecuted[0]} (exit() in a cell?)" if unexecuted else None
    except papermill.PapermillExecutionError as failure:
        error = f"cell {failure.cell_index + 1}: {failure.ename}: {failure.evalue}"
    except Exception as failure:  # noqa: BLE001 (dead kernels, broken notebooks: all are failures of this run)
        error = f"cell {number}: {type(failure).__name__}: {failure}"
    messages.send({"error": error})


class _BarsOf:
    """Takes what the notebook writes to stderr and passes on its progress bars, twice a minute at most."""

    def __init__(self, messages: Connection):
        self.messages, self.last = messages, 0.0

    def write(self, text: str) -> None:
        bars = [line for line in text.replace("\r", "\n").splitlines() if "%|" in line]
        if bars and time.time() - self.last > 30:
            self.last = time.time()
            self.messages.send({"progress": bars[-1].strip()})

    def flush(self) -> None:
        """Nothing is held back; papermill calls this after each write."""


def _set_environment(run: Run, settings: Settings, scratch: Path) -> None:
    """What the kernel inherits: where to write, and folders of its own, free of the user's Jupyter settings."""
    os.environ |= {
        "MDLM_FIGURES": str(run.figures),
        "MDLM_RESULTS": str(run.results),
        "PYTHONPATH": os.pathsep.join([str(settings.root), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONHASHSEED": "0",
        "IPYTHONDIR": str(scratch / "ipython"),
        "JUPYTER_PATH": str(scratch),
        "JUPYTER_RUNTIME_DIR": str(scratch),
    }
    # Threads that spin long while they wait stall each other when anything else wants a core; not to spin at all costs a fifth.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    if settings.force:
        os.environ["MDLM_FORCE"] = "1"
    if settings.threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))


def _transport(scratch: Path) -> dict:
    """Sockets in files: no ports to race for, no warning about unencrypted TCP. Windows has TCP only."""
    return {} if sys.platform == "win32" else {"transport": "ipc", "ip": str(scratch / "k")}


def _unexecuted(cell) -> bool:
    runs = cell.cell_type == "code" and cell.source.strip() and "skip-execution" not in cell.metadata.get("tags", [])
    return runs and cell.execution_count is None


def _escaped(path: Path) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")  # papermill takes paths for format strings
