"""Model cards of the shipped models: the measured part of data/models/<name>/README.md, from measured.json beside it and figures/.

measured.json is made by `python -m lib train NAME --measure` (lib/training/measuring.py), on prompts and text that no shipped model was
trained on; what steering does by the notebooks. Words around the tables are written by hand and stay as they are.
"""

import json
from pathlib import Path

import pandas as pd

from .files import atomic
from .paths import MODELS, REPO
from .statistics import Interval

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
LANGUAGES = {"en": "English", "zh": "Chinese"}
REFUSAL_SETS = {
    "contrast_harmful": "harmful requests (contrast test rows)",
    "contrast_twin": "their innocent twins",
    "contrast_innocent": "other innocent requests with dangerous words",
    "frames_harmful": "harmful requests (frames)",
    "frames_twin": "their innocent twins",
    "frames_plain": "plain requests in the same sentence",
    "ordinary": "ordinary instructions",
    "multijail": "MultiJail",
    "xstest_unsafe": "XSTest, unsafe",
    "xstest_safe": "XSTest, safe",
    "jailbreakbench_harmful": "JailbreakBench",
    "strongreject_harmful": "StrongREJECT",
}


def write(name: str, models: Path = MODELS) -> Path:
    """Put a model's measured.json into its card; returns the card's path."""
    path = models / name / "README.md"
    measured = json.loads((path.parent / "measured.json").read_text(encoding="utf8"))
    card = with_measured(path.read_text(encoding="utf8"), "\n".join([section(measured), *steering(name)]))
    with atomic(path) as temporary:
        temporary.write_text(card, encoding="utf8")
    return path


def section(measured: dict) -> str:
    """The measured part of a card, in Markdown: refusal by set, samples, held-out loss, and how they were made."""
    lines = []
    if refusal := measured.get("refusal"):
        lines += [
            "Share refused, 95 % Wilson interval, n. Greedy, one token a step, 32 slots; judged by the phrase list of `lib/evaluation.py`.",
            "",
            "| prompts, none of them trained on | English | Chinese |",
            "|---|---|---|",
        ]
        for key, label in REFUSAL_SETS.items():
            cells = [_shown(refusal.get(f"{key}_{language}")) for language in LANGUAGES]
            lines += [f"| {label} | {' | '.join(cells)} |"] if any(cell != "-" for cell in cells) else []
        lines.append("")
    if tradeoff := measured.get("tradeoff"):
        lines += [
            "Trade-off of the one-forward refusal score: AUROC, and the share of look-alikes above the threshold that 92 % of the "
            "harmful exceed.",
            "",
            "| harmful / look-alike | AUROC | look-alikes at 92 % |",
            "|---|---|---|",
        ]
        lines += [
            f"| {name.replace('_', ' ').replace('/', ' / ')} | {_shown(row['auroc'])} | {_shown(row['curve']['0.92'])} |"
            for name, row in tradeoff.items()
        ]
        lines.append("")
    if fluency := measured.get("fluency"):
        lines += [
            "Samples of up to 48 tokens, one a step, for ordinary instructions (mean over prompts, 95 % bootstrap interval, n).",
            "",
            "| | repeated bigrams | nats a token, scored by |",
            "|---|---|---|",
        ]
        for language, row in fluency.items():
            nats = row.get("nats_per_token")
            scorer = f" ({nats['scorer']})" if nats else ""
            lines.append(f"| {LANGUAGES[language]} | {_shown(row['repetition'])} | {_shown(nats)}{scorer} |")
        lines.append("")
    if held_out := measured.get("held_out"):
        kind = "next-token loss" if measured["causal"] else "diffusion bound"
        lines += [f"Held-out text, {kind} in nats a token (95 % bootstrap interval, n).", "", "| text | loss |", "|---|---|"]
        lines += [f"| {key.replace('_', ' ').replace('test ', '')} | {_shown(row)} |" for key, row in held_out.items()]
        lines.append("")
    made = measured["made"]
    commit = (
        f"commit {made['git']['commit'][:12]}{' with changes' if made['git']['dirty'] else ''}"
        if made["git"]
        else "no git checkout"
    )
    versions = ", ".join(
        f"{name} {version}" for name in ("python", "torch", "transformers") if (version := made["versions"].get(name))
    )
    lines.append(
        f"Weights {made['fingerprint']}; {made['device']}, {made['dtype']}; {commit}; {versions}. "
        f"Made by `python -m lib train {measured['model']} --measure`."
    )
    return "\n".join(lines)


def steering(name: str, figures: Path = REPO / "figures") -> list[str]:
    """Lines on what steering does to a model: the table behind figures/effect, if it is about this model."""
    record = figures / "effect.json"
    if not record.exists() or (facts := json.loads(record.read_text(encoding="utf8")))["run"]["model"] != name:
        return []
    lines = [
        "",
        f"Steering: {facts['caption']}",
        "",
        "| | refused | divergence, nats\\* | nats a token / baseline's\\* |",
        "|---|---|---|---|",
    ]
    for row in pd.read_csv(record.with_suffix(".csv")).to_dict("records"):
        shown = [
            str(Interval(row[key], row[f"{key}_lo"], row[f"{key}_hi"], int(row[n]))) if pd.notna(row[key]) else "-"
            for key, n in (("refused", "n"), ("divergence_answered", "n_answered"), ("nats_ratio", "n_answered"))
        ]
        lines.append(f"| {row['condition']}, {row['side']} {LANGUAGES[row['language']]} | {' | '.join(shown)} |")
    return [*lines, "", "\\* on prompts that are answered with and without steering; figures/effect.csv has the others too."]


def with_measured(text: str, section: str) -> str:
    """The card with its measured part replaced. Raises ValueError where the markers are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the card lacks the lines {BEGIN} and {END}, between which the numbers go")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def _shown(found: dict | None) -> str:
    return str(Interval(found["value"], found["lo"], found["hi"], found["n"])) if found else "-"
