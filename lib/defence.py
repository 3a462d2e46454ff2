"""The direction as a defence: added in the first denoising steps, in every response or only where a monitor on the prompt fires.

The monitor is the projection of the prompt alone on the direction at its cell (masked_extraction.readings): one forward pass before
the first slot is filled. What an attack puts into the response it cannot see, and what is put into the request it reads.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from .baselines import PLAIN, Asking
from .effects import Prompts
from .evaluation import word_count_scores
from .extraction import Direction
from .masked_extraction import readings
from .models import LanguageModel
from .prompts import Contrast, Language
from .statistics import auroc

MONITORS = ("projection", "word counts")


def threshold(harmful: Sequence[float], harmless: Sequence[float]) -> float:
    """Where a monitor should fire: above the midpoint between two neighbouring readings that gives the best balanced accuracy.

    The lowest of several as good ones; one that always or never fires is not considered. Raises ValueError where all readings are equal.
    """
    values = np.unique([*harmful, *harmless])
    if len(values) < 2:
        raise ValueError("all readings are equal: no threshold tells them apart")
    places = (values[:-1] + values[1:]) / 2
    balanced = [np.mean(np.asarray(harmful) > place) + np.mean(np.asarray(harmless) <= place) for place in places]
    return float(places[int(np.argmax(balanced))])


def watch(
    lm: LanguageModel, direction: Direction, prompts: Prompts, asking: Mapping[Language, Asking] | None = None
) -> list[dict]:
    """The monitor's reading of each prompt, put as `asking` says: rows language, side, prompt (its number), reading."""
    return [
        dict(language=language, side=side, prompt=prompt, reading=reading)
        for language, sides in prompts.items()
        for side, requests in sides.items()
        for prompt, reading in enumerate(readings(lm, direction, _put(requests, (asking or {}).get(language, PLAIN))))
    ]


def separation(
    watched: pd.DataFrame,
    train: Mapping[Language, Contrast],
    prompts: Prompts,
    asking: Mapping[Language, Asking] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC of harmful against harmless prompts, by language: rows language, monitor (MONITORS), auroc (with _lo, _hi) and n.

    Word counts, fitted on `train` as it is and shown the same prompts in the same way, are the control.
    """
    rows = []
    for language, sides in prompts.items():
        seen = watched[watched.language == language]
        shown = {side: tuple(_put(requests, (asking or {}).get(language, PLAIN))) for side, requests in sides.items()}
        pairs = Contrast(language, "test", shown["harmful"], shown["harmless"])
        read = [seen.reading[seen.side == side].tolist() for side in ("harmful", "harmless")]
        for monitor, scores in zip(MONITORS, (read, word_count_scores(train[language], pairs)), strict=True):
            area = auroc(*scores, seed=seed)
            rows.append(dict(language=language, monitor=monitor) | area.columns("auroc") | dict(n=area.n))
    return pd.DataFrame(rows)


def gated(rows: pd.DataFrame, on: str, off: str, fires: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows of effects.measure as a defence that `fires` switches on would leave them: of condition `on` where it fires, else of `off`.

    fires: language, side, prompt, and fires (bool) for every prompt of `rows`. Responses do not depend on their batch, so
    nothing has to be generated again. Raises ValueError for a prompt that `fires` lacks.
    """
    told = rows[rows.condition.isin([on, off])].merge(fires, on=["language", "side", "prompt"], how="left")
    if told.fires.isna().any():
        raise ValueError(f"the monitor has not read {int(told.fires.isna().sum())} of {len(told)} rows")
    chosen = told[told.fires.astype(bool) == (told.condition == on)]
    return chosen[rows.columns].assign(condition=name).reset_index(drop=True)


def _put(requests: Sequence[str], way: Asking) -> list[str]:
    return [way.instruction(request) for request in requests]
