"""What an intervention does: one row a prompt under each condition, then one table with intervals, controls and damage.

A condition is a list of *draws*, each a list of interventions: one draw for a direction that was chosen, several for a random
control, among which the prompts are dealt out. Every condition is measured on the same prompts and kept in the store of results
under its own interventions, so that a baseline is made once for all notebooks.
"""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from .baselines import PLAIN, Asking
from .evaluation import divergence, first_slots, nats_per_token, refusal_log_odds, repetition
from .extraction import Candidates, Direction
from .judges import Judge, phrases
from .models import LanguageModel
from .prompts import Language
from .results import sweep
from .sampling import respond
from .statistics import Interval, bootstrap, paired_ratio, random_directions, rate
from .steering import Intervention

Draws = Sequence[Sequence[Intervention]]
Prompts = Mapping[Language, Mapping[str, Sequence[str]]]  # language -> side (harmful, harmless) -> prompts
BASELINE = "baseline"
GROUP = ["condition", "language", "side"]
FEWEST = 5


def compare(
    lm: LanguageModel,
    scorer: LanguageModel,
    conditions: Mapping[str, Draws],
    prompts: Prompts,
    seed: int = 0,
    asking: Mapping[Language, Asking] | None = None,
    judge: Judge | None = None,
    **decoding,
) -> pd.DataFrame:
    """Rows of `measure` for every condition, language and side of `prompts`; `scorer` is a causal model that judges fluency.

    `asking`: how requests are put, by language; as they stand by default. `judge`: who says what is refused (judges.py); the phrase
    list by default.
    """
    cells = [dict(language=language, side=side) for language, sides in prompts.items() for side in sides]
    inputs = dict(lm=lm, scorer=scorer, prompts=prompts, seed=seed, asking=asking or {}, judge=judge, **decoding)
    tables = [
        sweep("effect", measure, cells, draws=draws, **inputs).assign(condition=name) for name, draws in conditions.items()
    ]
    return pd.concat(tables, ignore_index=True)


def measure(
    language: Language,
    side: str,
    lm: LanguageModel,
    scorer: LanguageModel,
    draws: Draws,
    prompts: Prompts,
    seed: int = 0,
    asking: Mapping[Language, Asking] | None = None,
    judge: Judge | None = None,
    **decoding,
) -> list[dict]:
    """One row a prompt, in order: refused (bool), log_odds (one-forward refusal score), nats a token under `scorer`, repetition,
    divergence from the model without steering, asked plainly (nats, first slots), empty (bool) and the response's text.

    Refusal and fluency are judged behind the plain request. Slots that `asking` gives count in the response, not in log_odds and
    divergence.

    The text of a response to a harmful request is not kept: an unrefused one has no place in a results table.
    """
    instructions, way = prompts[language][side], (asking or {}).get(language, PLAIN)

    def columns(numbers: Sequence[int], interventions: Sequence[Intervention]) -> dict:
        asked = [instructions[i] for i in numbers]
        put = [way.instruction(request) for request in asked]
        texts = respond(lm, put, interventions, seed, given=way.tokens(lm), **decoding)
        plain = first_slots(lm, asked)
        steered = first_slots(lm, put, interventions) if interventions or put != asked else plain
        return dict(
            refused=(judge or phrases())(asked, texts),
            log_odds=refusal_log_odds(lm, steered).tolist(),
            nats=nats_per_token(scorer, asked, texts),
            repetition=[repetition(lm, text) for text in texts],
            divergence=divergence(plain, steered).tolist(),
            empty=[not text for text in texts],
            text=texts if side == "harmless" else [None] * len(asked),
        )

    return dealt(draws, len(instructions), columns)


def dealt(draws: Draws, n: int, columns: Callable[[Sequence[int], Sequence[Intervention]], Mapping]) -> list[dict]:
    """One row for each of n prompts, in order, which are dealt out among the draws: prompt, draw, and what `columns` gives for the
    prompts of these numbers under a draw's interventions."""
    rows = []
    for draw, interventions in enumerate(draws[:n]):
        numbers = list(range(draw, n, len(draws)))
        known = dict(prompt=numbers, draw=[draw] * len(numbers)) | dict(columns(numbers, interventions))
        rows += [dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)]
    return sorted(rows, key=lambda row: row["prompt"])


def summary(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """One row for each condition, language and side: estimates, each with _lo and _hi (95 %, over prompts), and n.

    refused is a rate with its Wilson interval; divergence and nats are means over prompts. divergence_answered and nats_ratio
    compare the condition with the baseline on the n_answered prompts that neither refuses: where a refusal comes or goes, the
    distribution changes because it should, and refusals are fluent, so their number would pass for fluency. Both are missing
    where fewer than FEWEST prompts are left.
    """
    table = []
    for key, group in rows.groupby(GROUP, sort=False):
        row = dict(zip(GROUP, key)) | dict(n=len(group), draws=int(group.draw.max()) + 1)
        row |= _with_limits("refused", rate(group.refused))
        row |= _with_limits("divergence", bootstrap(group.divergence, seed=seed))
        told = group.nats.dropna()
        row |= _with_limits("nats", bootstrap(told, seed=seed) if len(told) > 1 else None)
        row |= dict(repetition=group.repetition.mean(), empty=group["empty"].mean())
        base = rows[(rows.condition == BASELINE) & (rows.language == row["language"]) & (rows.side == row["side"])]
        both = group.merge(base, on="prompt", suffixes=("", "_base"))
        both = both[~both.refused & ~both.refused_base & both.nats.notna() & both.nats_base.notna()]
        row["n_answered"] = len(both)
        enough = len(both) >= FEWEST
        row |= _with_limits("divergence_answered", bootstrap(both.divergence, seed=seed) if enough else None)
        row |= _with_limits("nats_ratio", paired_ratio(both.nats, both.nats_base, seed=seed) if enough else None)
        table.append(row)
    return pd.DataFrame(table)


def controls(candidates: Candidates, like: Direction, n: int, seed: int) -> list[Direction]:
    """`n` random directions with the scales and the harmless means of `like`'s cell: norm-matched controls for its effect."""
    vectors = random_directions(n, like.basis.shape[1], 1.0, seed)
    return [candidates.direction(like.layer, like.position, vector[None]) for vector in vectors]


def tell(table: pd.DataFrame) -> str:
    """A line for each row of `summary`, for people."""
    lines = []
    for row in table.itertuples():
        line = f"{row.condition:14s} {row.language} {row.side:8s}  refused {row.refused:.3f} [{row.refused_lo:.3f}, {row.refused_hi:.3f}]"
        line += f" (n = {row.n}), divergence {row.divergence:.2f}, {row.nats:.2f} nats a token"
        if pd.notna(row.nats_ratio):
            line += (
                f"; answered before and after (n = {row.n_answered}): divergence {row.divergence_answered:.2f}, nats a token "
            )
            line += f"x{row.nats_ratio:.2f} [{row.nats_ratio_lo:.2f}, {row.nats_ratio_hi:.2f}]"
        lines.append(line)
    return "\n".join(lines)


def _with_limits(name: str, interval: Interval | None) -> dict:
    return interval.columns(name) if interval else {name: None, f"{name}_lo": None, f"{name}_hi": None}
