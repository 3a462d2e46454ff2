"""A card says what measured.json says, and what is measured is not trained on."""

import json

import pandas as pd
import pytest

from lib import cards, shipped
from lib.paths import MODELS, PROMPTS
from lib.training.sources import contrast_rows

NAMES = sorted(path.parent.name for path in MODELS.glob("*/README.md"))


def test_words_stay_and_numbers_are_replaced():
    text = f"# Card\n\n{cards.BEGIN}\nold numbers\n{cards.END}\n\nLicence.\n"
    assert cards.with_measured(text, "new") == f"# Card\n\n{cards.BEGIN}\nnew\n{cards.END}\n\nLicence.\n"
    with pytest.raises(ValueError, match="lacks the lines"):
        cards.with_measured("# Card", "new")


def test_a_set_without_numbers_has_no_row():
    row = dict(value=0.1, lo=0.018, hi=0.404, n=10)
    made = dict(
        fingerprint="f00", device="CPU", dtype="float32", git={"commit": "a" * 40, "dirty": True}, versions={"torch": "2"}
    )
    text = cards.section(dict(model="smol-mdlm", causal=False, refusal={"frames_plain_zh": row}, made=made))
    assert "| plain requests in the same sentence | - | 0.10 [0.02, 0.40], n = 10 |" in text and "MultiJail" not in text
    assert "commit aaaaaaaaaaaa with changes; torch 2." in text


@pytest.mark.parametrize("name", NAMES)
def test_every_card_is_up_to_date_and_says_what_it_is_not_for(name):
    card, measured = ((MODELS / name / file).read_text() for file in ("README.md", "measured.json"))
    assert "**Not for**" in card
    part = card.partition(cards.BEGIN)[2].partition(cards.END)[0]  # figures/ changes with every run; steering() is tested below
    assert part.startswith(f"\n{cards.section(json.loads(measured))}\n")
    assert cards.with_measured(card, part.strip("\n")) == card
    assert json.loads(measured)["made"]["fingerprint"] == shipped.fingerprint(name)


def test_what_steering_does_is_told_of_the_model_it_was_done_to(tmp_path):
    numbers = dict(refused=0.1, refused_lo=0.018, refused_hi=0.404, divergence_answered=0.2, divergence_answered_lo=0.1)
    numbers |= dict(divergence_answered_hi=0.3, nats_ratio=None, nats_ratio_lo=None, nats_ratio_hi=None, n=10, n_answered=9)
    pd.DataFrame([dict(condition="removed", side="harmless", language="zh") | numbers]).to_csv(
        tmp_path / "effect.csv", index=False
    )
    (tmp_path / "effect.json").write_text(json.dumps(dict(caption="What it does.", run=dict(model="smol-mdlm"))))
    told = cards.steering("smol-mdlm", tmp_path)
    assert "| removed, harmless Chinese | 0.10 [0.02, 0.40], n = 10 | 0.20 [0.10, 0.30], n = 9 | - |" in told
    assert cards.steering("smol-ar", tmp_path) == cards.steering("smol-mdlm", tmp_path / "nowhere") == []


def test_frames_and_test_rows_are_not_in_the_training_data():
    rows = [json.loads(line) for line in (PROMPTS / "contrast.jsonl").read_text().splitlines()]
    harmless = [json.loads(line) for line in (MODELS.parent / "training" / "harmless.jsonl").read_text().splitlines()]
    written = contrast_rows()
    frames = [json.loads(line) for line in (PROMPTS / "frames.jsonl").read_text().splitlines()]
    prompts = [key for key in rows[0] if key.endswith(("harmful", "harmless"))]
    trained = {row[key] for row in written for key in prompts} | {
        row[key] for row in harmless for key in ("en_prompt", "zh_prompt")
    }
    unseen = {row[key] for row in rows if row["split"] == "test" for key in prompts if row[key]}
    unseen |= {text for row in frames for key, text in row.items() if key.startswith(("en_", "zh_"))}
    assert len(unseen) > 1300 and not trained & unseen
