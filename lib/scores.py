"""What one forward pass says of each prompt under a condition: a tenth of the time of texts, and the first step alone.

A condition is a dict of facts, such as the layer and what is done there, with the draws of effects.py, among which the prompts of a
side are dealt out. Facts become columns of a table with one row a prompt; then language (where prompts are given by language), side,
prompt, draw, and

    p            probability of refusal
    likely       p > 1/2
    answered     likely refused neither with the interventions nor without
    divergence   from the unsteered model in nats, of harmless prompts. Read it where they are answered: where a refusal comes or
                 goes, the distribution changes because it should.

`measured` fills the same rows with other columns, and `summary`, `per_prompt` and `tell` read them.
"""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch

from .effects import BASELINE, Draws, dealt
from .effects import Prompts as ByLanguage
from .evaluation import divergence, first_slots, refusal_log_odds, unsteered
from .identity import canonical, plain
from .models import LanguageModel
from .prompts import Language, Side
from .results import sweep
from .statistics import Interval, bootstrap, rate
from .steering import Intervention

Condition = tuple[Mapping, Draws]
Prompts = Mapping[Side, Sequence[str]]
# What tables tell, and the prompts it is read on: effect on harmful ones, damage on harmless ones, all or answered ones.
MEASURES = {
    "p": "harmful",
    "likely": "harmful",
    "divergence": "harmless",
    "divergence_answered": "answered",
    "refused": "harmful",
    "nats": "harmless",
}
SPOKEN = {"p": "refusal score", "likely": "above 1/2", "divergence_answered": "if answered"}
MISSING = Interval(float("nan"), float("nan"), float("nan"), 0)


def score(lm: LanguageModel, conditions: Sequence[Condition], prompts: Prompts | ByLanguage) -> pd.DataFrame:
    """One-forward scores of every prompt under every condition: p, likely, answered, divergence, see above."""
    return measured("score", _score, conditions, prompts, lm=lm)


def named(conditions: Mapping[str, Draws], **facts) -> list[Condition]:
    """Conditions of effects.compare, whose one fact is their name (condition), with the `facts` they share."""
    return [(dict(condition=name) | facts, draws) for name, draws in conditions.items()]


def measured(
    name: str, measure: Callable, conditions: Sequence[Condition], prompts: Prompts | ByLanguage, **inputs
) -> pd.DataFrame:
    """One row a prompt under every condition, kept in the store as `name`: facts, language, side, prompt, draw, columns of `measure`.

    `measure(side, instructions, numbers, interventions, **inputs)` gives columns for the prompts numbered `numbers`.
    """
    draws = {canonical(plain(facts, "facts")): steer for facts, steer in conditions}
    groups = []
    for key, value in prompts.items():
        groups += [dict(language=key, side=side) for side in value] if isinstance(value, Mapping) else [dict(side=key)]
    cells = [dict(facts) | group for facts, _ in conditions for group in groups]
    return sweep(name, _row_a_prompt, cells, measure=measure, draws=draws, prompts=prompts, inputs=inputs)


def summary(rows: pd.DataFrame, by: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """One row a group of `by`, in order of appearance: each of MEASURES that `rows` tell, with _lo and _hi, and n_<its prompts>.

    A rate has its Wilson interval, a mean its bootstrap one (95 %, over prompts); missing where fewer than two prompts have a value.
    """
    measures, table = [measure for measure in MEASURES if len(_values(rows, measure))], []
    for key, group in rows.groupby(list(by), sort=False, dropna=False):
        row = dict(zip(by, key, strict=True))
        for measure in measures:
            values, found = _values(group, measure).dropna().infer_objects(), MISSING
            if len(values) > 1:
                found = rate(values) if values.dtype == bool else bootstrap(values, seed=seed)
            row |= {f"n_{MEASURES[measure]}": len(values)} | found.columns(measure)
        table.append(row)
    return pd.DataFrame(table)


def per_prompt(rows: pd.DataFrame, measure: str, **facts) -> pd.Series:
    """Values of one of MEASURES, one a prompt in order, from the rows whose facts are as given (a collection: one of these).

    Where several rows of a prompt are left, such as those of many layers, their mean.
    """
    for name, value in facts.items():
        rows = rows[rows[name].isin([value] if isinstance(value, str | int) else list(value))]
    values = _values(rows.set_index("prompt"), measure).dropna().infer_objects().groupby(level="prompt")
    return values.first() if values.size().eq(1).all() else values.mean()


def tell(table: pd.DataFrame) -> str:
    """A line for each row of `summary`, for people."""
    measures = [measure for measure in MEASURES if measure in table]
    no_facts = {f"{measure}{limit}" for measure in measures for limit in ("", "_lo", "_hi")}
    no_facts |= {f"n_{prompts}" for prompts in MEASURES.values()}
    lines = []
    for row in table.to_dict("records"):
        facts = [value for name, value in row.items() if name not in no_facts and pd.notna(value)]
        found = {
            measure: Interval(*(row[f"{measure}{limit}"] for limit in ("", "_lo", "_hi")), int(row[f"n_{MEASURES[measure]}"]))
            for measure in measures
            if pd.notna(row[measure])
        }
        about = ", ".join(f"{value:.0f}" if isinstance(value, float) else str(value) for value in facts)
        lines.append(f"{about}: " + "; ".join(f"{SPOKEN.get(name, name)} {interval}" for name, interval in found.items()))
    return "\n".join(lines)


def bounded(rows: pd.DataFrame, condition: str, max_divergence: float, name: str) -> pd.DataFrame:
    """Rows of `condition` under another `name`, for claims: an effect bought by damage is none.

    Where the mean divergence on a language's answered harmless prompts exceeds `max_divergence`, where none is answered, and where
    the condition does not exist because no direction keeps to the bound, the unsteered model's rows stand in.
    """
    parts = []
    for _, group in rows.groupby("language", sort=False):
        found = group[group.condition == condition]
        whole = _values(found, "divergence_answered").mean() <= max_divergence  # no rows: nan, so not
        parts.append(found if whole else group[group.condition == BASELINE])
    return pd.concat(parts, ignore_index=True).assign(condition=name)


def short_of(rows: pd.DataFrame, condition: str, share: float, name: str) -> pd.DataFrame:
    """Rows of `condition` under another `name` with `share` of their effect on p taken back: what counts as good as it must beat.

    A margin in shares, since whatever does nothing stays within a fixed distance of a condition that does nothing.
    """
    key = ["language", "side", "prompt"]
    base = rows[rows.condition == BASELINE].set_index(key).p
    found = rows[rows.condition == condition].set_index(key)
    return found.assign(p=found.p + share * (base.reindex(found.index) - found.p), condition=name).reset_index()


def _values(rows: pd.DataFrame, measure: str) -> pd.Series:
    """A measure on the side it is read on, missing where a prompt has none; empty where `rows` have no such column or side."""
    prompts = MEASURES[measure]
    column = measure.removesuffix(f"_{prompts}")
    if column not in rows:
        return pd.Series(dtype=float)
    read = rows[rows.side == ("harmless" if prompts == "answered" else prompts)]
    return read[column].where(read.answered) if prompts == "answered" else read[column]


def _row_a_prompt(
    measure: Callable,
    draws: Mapping[str, Draws],
    prompts: Prompts | ByLanguage,
    inputs: Mapping,
    side: Side,
    language: Language | None = None,
    **facts,
) -> list[dict]:
    instructions = tuple((prompts[language] if language else prompts)[side])
    return dealt(
        draws[canonical(facts)],
        len(instructions),
        lambda numbers, interventions: measure(side, instructions, numbers, interventions, **inputs),
    )


def _score(
    side: Side, instructions: tuple[str, ...], numbers: list[int], interventions: Sequence[Intervention], lm: LanguageModel
) -> dict:
    base = unsteered(lm, instructions)[numbers]
    steered = first_slots(lm, [instructions[i] for i in numbers], interventions) if interventions else base
    before, p = (refusal_log_odds(lm, scored).sigmoid() for scored in (base, steered))
    return dict(
        p=p.tolist(),
        likely=(p > 0.5).tolist(),
        answered=(torch.maximum(before, p) <= 0.5).tolist(),
        divergence=divergence(base, steered).tolist() if side == "harmless" else [None] * len(numbers),
    )
