"""Which runs there are, what each would be made from now, and the reasons why one is stale.

A run is a study on a model. It is up to date when its last record says that it succeeded with the same notebook,
parameters, code, prompts, weights, lock file and earlier studies, and what it wrote is still there. Knows nothing of
kernels.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .files import sha256
from .identity import code, digest, imported, plain
from .studies import PROFILES, Study, UserError, check_parameters, known, read_cells, read_studies

DEFAULT_MODEL = "smol-mdlm"
FIGURE_FILES = (".pdf", ".png", ".csv", ".json")
LOCK = "requirements.lock"


@dataclass(frozen=True)
class Run:
    """One study on one model.

    parameters: what is set, over the notebook's defaults. identity: what the run would be made from. notebook: the
    executed copy. figures, results: folders it writes to. reasons: why it must run; none when it is up to date.
    """

    study: Study
    model: str
    profile: str
    parameters: dict
    identity: dict
    notebook: Path
    figures: Path
    results: Path
    reasons: tuple[str, ...] = ()

    @property
    def record(self) -> Path:
        return self.notebook.with_suffix(".json")

    @property
    def key(self) -> str:
        return digest(self.identity)[:16]

    @property
    def minutes(self) -> float:
        return float(self.study.minutes.get(self.profile, 1.0))

    @property
    def state(self) -> str:
        if not self.reasons:
            return "up to date"
        return "failed" if self.reasons[0].startswith("last run failed") else "would run"

    def missing_figures(self) -> list[str]:
        """Files that the study's figures should have left and that are not there."""
        files = (self.figures / f"{figure}{suffix}" for figure in self.study.figures for suffix in FIGURE_FILES)
        return [file.name for file in files if not file.exists()]


def plan(
    root: Path,
    profile: str = "cpu",
    models: Iterable[str] = (DEFAULT_MODEL,),
    only: Iterable[str] = (),
    out: Path | None = None,
    force: bool = False,
    parameters: Mapping | None = None,
) -> list[Run]:
    """Every selected study on every model, each study after those it builds on.

    `parameters` go to each notebook that declares them. Everything is written into the repository's own folders, or
    below `out`; the toy numbers of the smoke profile below runs/smoke. Figures of other models than the default have a
    folder of their own. Raises UserError for whatever does not fit: an unknown study, profile or parameter, a value of
    the wrong type, a malformed entry or notebook.
    """
    studies = read_studies(root)
    known("profile", [profile], PROFILES)
    selected = known("study", only, studies) or list(studies)
    given = plain(parameters or {}, "parameters")
    if "model" in given:
        raise UserError("choose the model with --model (or `models`), not as a parameter")
    known("parameter", given, {name for study in selected for name in studies[study].declared})
    figures, results, notebooks = places(root, profile, out)
    lock = sha256(root / LOCK) if (root / LOCK).exists() else None
    prompts = _files(root, root / "data" / "prompts", ".jsonl")
    runs = []
    for name in dict.fromkeys(models):
        model, slug, weights = resolve_model(root, name)
        keys = {}
        for study in studies.values():
            chosen = {name: value for name, value in given.items() if name in study.declared}
            values = study.parameters.get(profile, {}) | chosen | {"model": model}
            check_parameters(study.notebook, study.declared, values)
            identity = {
                "notebook": digest([list(cell) for cell in read_cells(study.notebook)]),
                "parameter": {name: default for name, (_, default) in study.declared.items()} | values,
                "code": _code(root, study.notebook),
                "prompts": prompts,
                "model weights": weights,
                "lock file": lock,
                "study": {earlier: keys[earlier] for earlier in study.after},
            }
            run = Run(
                study=study,
                model=model,
                profile=profile,
                parameters=values,
                identity=identity,
                notebook=notebooks / slug / f"{study.id}.ipynb",
                figures=figures if model == DEFAULT_MODEL else figures / slug,
                results=results,
            )
            keys[study.id] = run.key
            if study.id in selected:
                runs.append(replace(run, reasons=why(run) + (("forced",) if force else ())))
    return runs


def places(root: Path, profile: str, out: Path | None) -> tuple[Path, Path, Path]:
    """Folders for figures, results and executed notebooks."""
    if out is None and profile != "smoke":
        return root / "figures", root / "data" / "results", root / "runs" / "notebooks"
    out = Path(out).resolve() if out is not None else root / "runs" / "smoke"
    return out / "figures", out / "results", out / "notebooks"


def resolve_model(root: Path, name: str) -> tuple[str, str, str]:
    """Name to load, name for files, identity of the weights: of a shipped model by content, of a directory by its
    listing.

    A directory of 16 GB is not read for that: names, sizes and times of its files stand for them. A hub id stands for
    itself.
    """
    shipped = {path.parent.name: path.parent for path in root.glob("data/models/*/config.json")}
    if name in shipped:
        return name, name, digest(_files(root, shipped[name], ".json", ".safetensors"))
    folder = Path(name).resolve()
    if folder.is_dir():
        stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
        slug = f"{_slug(folder.name)}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}"
        return str(folder), slug, digest([[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats])
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise UserError(f"there is no model directory {name}")
    return name, _slug(name), name


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip(".")


def _files(root: Path, folder: Path, *suffixes: str) -> dict[str, str]:
    """Content identity of the files below `folder` with one of the suffixes, by path in the repository; notes do not count."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in suffixes and not path.name.startswith("."))
    return {path.relative_to(root).as_posix(): sha256(path) for path in files}


def _code(root: Path, notebook: Path) -> dict[str, str]:
    """Modules of lib that the notebook's cells import, and all that these reach."""
    lines = "\n".join(source for kind, source, _ in read_cells(notebook) if kind == "code").splitlines()
    source = "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))  # Jupyter's own commands
    try:
        return code(root / "lib", imported(root / "lib", source))
    except SyntaxError as error:
        raise UserError(f"{notebook.name}: not Python, so what it imports is unknown: {error.msg}: {error.text}") from error


# --- reasons ----------------------------------------------------------------------------------------------------------


def why(run: Run) -> tuple[str, ...]:
    """How the record of the last run, and what it wrote, differ from what the run would be made from now."""
    if not run.record.exists():
        return ("never run",)
    record = json.loads(run.record.read_text(encoding="utf-8"))
    before, reasons = record["identity"], []
    if record["status"] == "failed":
        reasons.append(f"last run failed ({record['error'].splitlines()[0]})")
    elif record["status"] != "ok":
        reasons.append("last run did not finish")
    for part, now in run.identity.items():
        reasons += _changes(part, before.get(part), now)
    if record["status"] == "ok":
        gone = [] if run.notebook.exists() else [run.notebook.name]
        reasons += [f"{name} is missing" for name in gone + run.missing_figures()]
    return tuple(reasons)


def _changes(part: str, before, now) -> list[str]:
    if not isinstance(now, dict) or not isinstance(before, dict):
        return [f"{part} changed"] if before != now else []
    different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if part == "parameter":
        return [f"parameter {name}: {before.get(name)!r} -> {now.get(name)!r}" for name in different]
    label = "study " if part == "study" else ""
    verb = {name: "removed" if name not in now else "added" if name not in before else "changed" for name in different}
    return [f"{label}{name} {verb[name]}" for name in different]
