"""Model cards of the shipped models: the measured part of data/models/<name>/README.md, written by `python -m lib card`.

Prompts that no shipped model was trained on: the test rows of data/prompts/contrast.jsonl (harmful requests, their innocent
twins, other innocent requests with dangerous words or in the style of harmful ones) and data/prompts/frames.jsonl (harmful,
twin, and a plain request in the same sentence frame). Words around the table are written by hand and stay as they are.
"""

import json
import platform
from pathlib import Path

import pandas as pd
import torch
import transformers

from .effects import BASELINE, Prompts, measure, summary
from .files import atomic, git_state
from .models import load
from .paths import MODELS, PROMPTS, REPO
from .results import sweep

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SCORER = "smol-base"
DECODING = dict(gen_length=32)


def card(name: str, limit: int | None = None) -> Path:
    """Measure a shipped model (at most `limit` prompts a set) and write the numbers into its card; returns the card's path.

    Twenty minutes to an hour on two CPU cores, a minute on a GPU; finished sets are kept in the store of results.
    """
    lm, scorer = load(name), load(SCORER)
    prompts = {language: {side: rows[:limit] for side, rows in sides.items()} for language, sides in held_out().items()}
    cells = [dict(language=language, side=side) for language, sides in prompts.items() for side in sides]
    rows = sweep("card", measure, cells, lm=lm, scorer=scorer, draws=[[]], prompts=prompts, **DECODING)
    table = summary(rows.assign(condition=BASELINE))
    facts = dict(
        model=name,
        fingerprint=lm.fingerprint,
        decoding=DECODING,
        device=torch.cuda.get_device_name() if lm.device.type == "cuda" else "CPU",
        dtype=str(lm.model.dtype).removeprefix("torch."),
        git=git_state(REPO),
        versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__),
    )
    path = MODELS / name / "README.md"
    with atomic(path) as temporary:
        temporary.write_text(_with_measured(path.read_text(encoding="utf8"), _section(table, facts)), encoding="utf8")
    return path


def held_out() -> Prompts:
    """The sets of a card: {language: {set: prompts}}."""
    contrast, frames = (_rows(PROMPTS / name) for name in ("contrast.jsonl", "frames.jsonl"))
    contrast = [row for row in contrast if row["split"] == "test"]
    pairs = [row for row in contrast if row["en_harmful"]]
    return {
        language: {
            "contrast: harmful": tuple(row[f"{language}_harmful"] for row in pairs),
            "contrast: innocent twin": tuple(row[f"{language}_harmless"] for row in pairs),
            "contrast: other innocent": tuple(row[f"{language}_harmless"] for row in contrast if row not in pairs),
            "frames: harmful": tuple(row[f"{language}_harmful"] for row in frames),
            "frames: innocent twin": tuple(row[f"{language}_twin"] for row in frames),
            "frames: plain": tuple(row[f"{language}_plain"] for row in frames),
        }
        for language in ("en", "zh")
    }


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def _section(table: pd.DataFrame, facts: dict) -> str:
    """The generated part of a card, in Markdown."""
    names = {"en": "English", "zh": "Chinese"}
    lines = [
        f"Share refused (first {facts['decoding']['gen_length']} tokens, one a step, greedy; phrase list of `lib/evaluation.py`) with its "
        f"95 % Wilson interval, nats a token of the responses under {SCORER} (mean, 95 % bootstrap; an English model, so its Chinese "
        "column compares only within Chinese), share of repeated bigrams.",
        "",
        "| prompts (never trained on) | n | refused | nats a token | repeated bigrams |",
        "|---|---|---|---|---|",
    ]
    for row in table.itertuples():
        refused = f"{row.refused:.3f} [{row.refused_lo:.3f}, {row.refused_hi:.3f}]"
        nats = f"{row.nats:.2f} [{row.nats_lo:.2f}, {row.nats_hi:.2f}]" if pd.notna(row.nats) else "-"
        lines.append(f"| {row.side}, {names[row.language]} | {row.n} | {refused} | {nats} | {row.repetition:.3f} |")
    commit = facts["git"]["commit"][:12] + (" with changes" if facts["git"]["dirty"] else "") if facts["git"] else "unknown"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return "\n".join(
        [*lines, "", f"Weights {facts['fingerprint']}; {facts['device']}, {facts['dtype']}; commit {commit}; {versions}. "
         f"Made by `python -m lib card {facts['model']}`."]
    )  # fmt: skip


def _with_measured(text: str, section: str) -> str:
    """The card with its measured part replaced. Raises ValueError where the markers are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the card lacks the lines {BEGIN} and {END}, between which the numbers go")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"
