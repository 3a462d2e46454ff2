"""A card says what measured.json says, and what is measured is not trained on."""

import json

import pytest

from lib import cards, shipped
from lib.paths import MODELS, PROMPTS

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
    assert cards.with_measured(card, "\n".join([cards.section(json.loads(measured)), *cards.steering(name)])) == card
    assert json.loads(measured)["made"]["fingerprint"] == shipped.fingerprint(name)


def test_frames_and_test_rows_are_not_in_the_training_data():
    rows = [json.loads(line) for line in (PROMPTS / "contrast.jsonl").read_text().splitlines()]
    harmless = [json.loads(line) for line in (MODELS.parent / "training" / "harmless.jsonl").read_text().splitlines()]
    frames = [json.loads(line) for line in (PROMPTS / "frames.jsonl").read_text().splitlines()]
    prompts = [key for key in rows[0] if key.endswith(("harmful", "harmless"))]
    trained = {row[key] for row in rows if row["trained"] for key in prompts} | {
        row[key] for row in harmless for key in ("en_prompt", "zh_prompt")
    }
    unseen = {row[key] for row in rows if row["split"] == "test" for key in prompts if row[key]}
    unseen |= {text for row in frames for key, text in row.items() if key.startswith(("en_", "zh_"))}
    assert len(unseen) > 1300 and not trained & unseen
