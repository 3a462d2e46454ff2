"""What there is to run: notebooks, their entries in notebooks/studies.toml, and their typed parameters.

    [dose-response]                                   # the id: it stays when notebooks are renumbered
    notebook = "04_dose_response.ipynb"
    title = "How much steering does refusal take?"
    after = ["selection"]                             # studies above whose results it reads
    figures = ["dose-response"]                       # what it must leave in figures/
    minutes = {smoke = 0.5, cpu = 6, paper = 40}      # expected duration; 1 where nothing is said
    smoke = {n_prompts = 4, strengths = [0.0, 1.0]}   # parameters by profile, over the notebook's own defaults
    paper = {n_prompts = 500}

Knows nothing of kernels, nor of what has been run.
"""

import ast
import difflib
import json
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args, get_origin

from .identity import plain

PROFILES = ("smoke", "cpu", "paper")
KEYS = {"notebook": str, "title": str, "after": list, "figures": list, "minutes": dict} | dict.fromkeys(PROFILES, dict)
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}


class UserError(ValueError):
    """Something asked for, or written in a study, cannot be done; the message says what would be valid."""


@dataclass(frozen=True)
class Study:
    """One entry of studies.toml, and what its notebook declares.

    minutes: expected duration by profile. declared: (type, default) of each parameter. parameters: those that a profile
    sets.
    """

    id: str
    notebook: Path
    title: str
    declared: Mapping[str, tuple]
    after: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    minutes: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, dict] = field(default_factory=dict)


def read_studies(root: Path) -> dict[str, Study]:
    """The studies of notebooks/studies.toml by id, in reading order. Raises UserError for a malformed entry."""
    path = root / "notebooks" / "studies.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: {error}") from error
    studies = {}
    for name, table in tables.items():
        where = f"{path.name} [{name}]"
        known(f"key in {where}", table, KEYS)
        for key, value in table.items():
            if not isinstance(value, KEYS[key]):
                raise UserError(f"{where}: {key} = {value!r} must be a {KEYS[key].__name__}")
        if lacking := {"notebook", "title"} - table.keys():
            raise UserError(f"{where} lacks {' and '.join(sorted(lacking))}")
        known(f"study in `after` of {where} (a study stands below those it builds on)", table.get("after", ()), studies)
        known(f"profile in `minutes` of {where}", table.get("minutes", ()), PROFILES)
        notebook = path.parent / table["notebook"]
        if not notebook.is_file():
            raise UserError(f"{where}: there is no notebook {notebook}")
        if setters := [profile for profile in PROFILES if "model" in table.get(profile, {})]:
            raise UserError(f"{where} sets `model` in {setters[0]}; it is chosen when the notebooks are run")
        studies[name] = Study(
            id=name,
            notebook=notebook,
            title=table["title"],
            declared=declared_parameters(notebook),
            after=tuple(table.get("after", ())),
            figures=tuple(table.get("figures", ())),
            minutes=table.get("minutes", {}),
            parameters={profile: table[profile] for profile in PROFILES if profile in table},
        )
    return studies


def read_cells(notebook: Path) -> list[tuple[str, str, list[str]]]:
    """(type, source, tags) of each cell: what a notebook is, without outputs and the traces that opening it leaves."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in cells]


def declared_parameters(notebook: Path) -> dict[str, tuple]:
    """(type, default) of each line `name: type = default` in the cell tagged "parameters".

    Read as syntax: papermill's own inspection is by regular expression and loses lines with a second `=` in their
    comment. Raises UserError for a missing cell, other statements, types other than TYPES, and where `model: str` or
    `seed: int` is missing.
    """
    source = next((source for kind, source, tags in read_cells(notebook) if kind == "code" and "parameters" in tags), None)
    if source is None:
        raise UserError(f'{notebook.name} has no code cell tagged "parameters" (in Jupyter: property inspector, Cell Tags)')
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise UserError(f"{notebook.name}: parameters cell, line {error.lineno}: {error.msg}") from error
    declared = {}
    for statement in statements:
        text = ast.unparse(statement)
        try:
            kind = eval(ast.unparse(statement.annotation), {"__builtins__": {}}, TYPES)
            declared[statement.target.id] = kind, plain(ast.literal_eval(statement.value), text)
        except (AttributeError, NameError, TypeError, ValueError) as error:
            form = f"name: type = literal, with a type made of {', '.join(TYPES)}, None, | and []"
            raise UserError(f"{notebook.name}: parameters cell has `{text}`; each line must be {form}") from error
    if lacking := [line for line in ("model: str", "seed: int") if line.split(":")[0] not in declared]:
        raise UserError(f"{notebook.name}: parameters cell lacks `{'` and `'.join(lacking)}`")
    check_parameters(notebook, declared, {name: default for name, (_, default) in declared.items()})
    return declared


def check_parameters(notebook: Path, declared: Mapping[str, tuple], values: Mapping) -> None:
    """Raise UserError unless each value belongs to a declared parameter and is of its type."""
    known(f"{notebook.name}: parameter", values, declared)
    for name, value in values.items():
        kind = declared[name][0]
        if not _fits(value, kind):
            kind = kind.__name__ if isinstance(kind, type) and not get_args(kind) else kind
            raise UserError(f"{notebook.name}: {name} = {value!r} is a {type(value).__name__}; it must be {kind}")


def _fits(value, kind) -> bool:
    """Whether a JSON value is of a type: True is no number, and an int is good where a float is asked for."""
    arguments = get_args(kind)
    if kind in (None, types.NoneType):
        return value is None
    if isinstance(kind, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if not isinstance(value, get_origin(kind) or kind):
        return False
    return (
        all(_fits(item, arguments[-1]) for item in (value.values() if isinstance(value, dict) else value))
        if arguments
        else True
    )


def known(what: str, names: Iterable[str], valid: Iterable[str]) -> list[str]:
    """`names`, all of them valid; UserError names the first that is not, and the nearest that is."""
    names, valid = list(names), sorted(valid)
    for name in names:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"unknown {what} {name!r}; {hint}known: {', '.join(valid) or 'none'}")
    return names
