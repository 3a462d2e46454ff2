"""What the papers claim, and what was found: one row a claim, with effect, control, interval, n and a verdict by rule.

A claim travels with the figure that shows it, `figures.save(..., claims=[...])`, and `collect` gathers those of a folder of figures
into one table. A claim counts as reproduced when the effect lies on the claimed side of its control with a permutation p-value
that is below LEVEL after Holm's correction over the whole table. Knows numbers and files; knows nothing of models.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from .statistics import Controlled, Interval, bootstrap, holm, permutation_pvalue, rate

LEVEL = 0.05
Side = Literal["higher", "lower"]
COLUMNS = [
    "id", "claim", "source", "model", "measure", "effect", "effect_lo", "effect_hi", "n", "control_is", "control", "control_lo",
    "control_hi", "n_control", "claimed", "p", "p_holm", "verdict", "why", "figure",
]  # fmt: skip


def compared(
    id: str,
    claim: str,
    source: str,
    model: str,
    measure: str,
    effect: Sequence[float],
    control: Sequence[float],
    control_is: str,
    claimed: Side,
    paired: bool,
    why: str = "",
    seed: int = 0,
) -> dict:
    """A claim about values of prompts, one a prompt, against values under a control; `paired`: of the same prompts in order.

    Booleans give rates with Wilson intervals, other numbers means with bootstrap ones.
    """
    estimates = [_estimate(values, seed) for values in (effect, control)]
    p = permutation_pvalue(np.asarray(effect, float), np.asarray(control, float), paired=paired, seed=seed)
    return _row(id, claim, source, model, measure, *estimates, control_is, claimed, p, why)


def between(
    rows: pd.DataFrame,
    id: str,
    claim: str,
    source: str,
    model: str,
    effect: str,
    control: str,
    claimed: Side,
    side: str = "harmful",
    column: str = "refused",
    why: str = "",
) -> list[dict]:
    """A claim about two conditions of `effects.measure`'s rows, for each language: <id>-<language>.

    Paired where both conditions have the same prompts.
    """
    found = []
    for language, group in rows[rows.side == side].groupby("language", sort=False):
        a, b = (group[group.condition == name].sort_values("prompt") for name in (effect, control))
        paired = a.prompt.tolist() == b.prompt.tolist()
        about = f"{claim} ({language})", source, model, f"{column}, {side} prompts"
        values = (part[column].to_numpy() for part in (a, b))
        found.append(compared(f"{id}-{language}", *about, *values, control, claimed, paired, why))
    return found


def against_null(
    id: str, claim: str, source: str, model: str, measure: str, effect: Controlled, null_is: str, why: str = ""
) -> dict:
    """A claim that a statistic is higher than under its null (see statistics.one_dimensionality)."""
    null = Interval(effect.null_mean, effect.null_mean, effect.null_q95, effect.n)
    return _row(id, claim, source, model, measure, effect, null, null_is, "higher", effect.pvalue, why)


def untestable(id: str, claim: str, source: str, model: str, why: str) -> dict:
    """A claim that cannot be tested here; `why` says what it would take."""
    return dict(id=id, claim=claim, source=source, model=model, why=why)


def collect(folder: Path) -> pd.DataFrame:
    """Every claim beside the figures of `folder` (COLUMNS), sorted by id. Raises ValueError for an id that stands there twice."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        rows += [row | dict(figure=path.stem) for row in json.loads(path.read_text(encoding="utf8")).get("claims", ())]
    table = pd.DataFrame(rows).reindex(columns=COLUMNS).sort_values("id", ignore_index=True)
    if twice := sorted(table.id[table.id.duplicated()]):
        raise ValueError(f"{folder}: claims {twice} are made by more than one figure")
    tested = table.p.notna()
    if tested.any():
        table.loc[tested, "p_holm"] = holm(table.p[tested])
    table["verdict"] = [_verdict(row) for row in table.itertuples()]
    return table


def _verdict(row) -> str:
    if pd.isna(row.p):
        return "not testable here"
    right_side = row.effect > row.control if row.claimed == "higher" else row.effect < row.control
    return "reproduced" if right_side and row.p_holm < LEVEL else "not reproduced"


def _estimate(values: Sequence[float], seed: int) -> Interval:
    values = np.asarray(values)
    return rate(values) if values.dtype == bool else bootstrap(values, seed=seed)


def _row(id, claim, source, model, measure, effect, control, control_is, claimed, p, why) -> dict:
    facts = dict(id=id, claim=claim, source=source, model=model, measure=measure, claimed=claimed, p=p, why=why)
    return (
        facts
        | effect.columns("effect")
        | control.columns("control")
        | dict(n=effect.n, n_control=control.n, control_is=control_is)
    )
