"""Runs the notebooks that are stale, several at a time, each after those it builds on.

    python -m lib run --profile smoke

The executed copy of a notebook is runs/notebooks/<model>/<study>.ipynb, the record of its run lies beside it (.json).
An interrupted run leaves its finished notebooks, and inside a sweep its finished cells (results.py): the same command
goes on from there.
"""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path

from .execution import Settings, Worker
from .paths import REPO
from .planning import DEFAULT_MODEL, Run, plan
from .studies import UserError


def run(
    profile: str = "cpu",
    models: Iterable[str] = (DEFAULT_MODEL,),
    only: Iterable[str] = (),
    jobs: int = 1,
    out: Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    parameters: Mapping | None = None,
    root: Path = REPO,
) -> int:
    """Execute every study that is not up to date on every model; 0 if all is well at the end, 1 if something failed.

    A failed study stops those that build on it, and no others. `dry_run` only prints the table of states and reasons.
    `force` runs what is up to date too, and measures again what the store of results holds. Raises UserError before
    anything is run (see `plan`), KeyboardInterrupt after stopping the kernels on Ctrl-C and SIGTERM.
    """
    if jobs < 1:
        raise UserError(f"jobs = {jobs}; at least one notebook must run at a time")
    runs = plan(root, profile, models, only, out, force, parameters)
    states = [(*_names(run), run.state, "; ".join(run.reasons)) for run in runs]
    print(_table(("study", "model", "state", "why"), states))
    stale = [run for run in runs if run.reasons]
    print(f"{len(stale)} of {len(runs)} notebooks to run, about {_duration(_remaining(stale, jobs))}", flush=True)
    if dry_run or not stale:
        return 0
    with _sigterm_as_interrupt(), tempfile.TemporaryDirectory(prefix="mdlm-", ignore_cleanup_errors=True) as scratch:
        # Several notebooks at a time share the cores; one alone takes what its libraries like best.
        threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
        rows = _execute_all(stale, jobs, Settings(root, Path(scratch), force, threads))
    print(_table(("study", "model", "outcome", "time", "error"), rows), flush=True)
    return int(any(row[2] != "ok" for row in rows))


# --- who runs next ----------------------------------------------------------------------------------------------------


def _execute_all(stale: list[Run], jobs: int, settings: Settings) -> list[tuple]:
    """Rows (study, model, outcome, time, error) in the order in which the runs ended."""
    waiting, running, ended, rows, begun = list(stale), {}, {}, [], time.time()
    try:
        while waiting or running:
            for run in list(waiting):
                earlier = [(study, run.model) for study in run.study.after]
                stopped = [study for study, model in earlier if ended.get((study, model), "ok") != "ok"]
                pending = {_id(other) for other in (*waiting, *(worker.run for worker in running.values()))}
                if stopped:
                    waiting.remove(run)
                    ended[_id(run)] = "skipped"
                    rows.append((*_names(run), "skipped", "", f"{stopped[0]} did not succeed"))
                elif len(running) < jobs and not pending.intersection(earlier):
                    waiting.remove(run)
                    worker = Worker(run, settings)
                    running[worker.messages] = worker
            for messages in wait(list(running)) if running else ():  # all that was left may have been skipped
                worker = running[messages]
                text = worker.hear()
                if worker.over:
                    del running[messages]
                    ended[_id(worker.run)] = text
                    error = (worker.record["error"] or "").partition("\n")[0]
                    rows.append((*_names(worker.run), text, _duration(worker.record["seconds"]), error))
                left = _duration(_remaining(waiting, jobs, running.values()))
                name = " ".join(_names(worker.run))
                clock = f"[{len(rows)}/{len(stale)}] {_duration(time.time() - begun)}"
                print(f"{clock}  {name}: {text}; about {left} left", flush=True)
    finally:
        for worker in running.values():
            worker.process.terminate()
        for worker in running.values():
            worker.stop()
    return rows


def _remaining(waiting: Iterable[Run], jobs: int, running: Iterable[Worker] = ()) -> float:
    """Expected seconds until all is done, from the studies' own `minutes`."""
    ahead = [60 * run.minutes for run in waiting]
    ahead += [max(0.0, 60 * worker.run.minutes - (time.time() - worker.started)) for worker in running]
    return max(sum(ahead) / jobs, max(ahead, default=0.0))


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does. Only the main thread may say so; elsewhere SIGTERM stays as it is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- what people read -------------------------------------------------------------------------------------------------


def _id(run: Run) -> tuple[str, str]:
    return run.study.id, run.model


def _names(run: Run) -> tuple[str, str]:
    return run.study.id, run.notebook.parent.name


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
