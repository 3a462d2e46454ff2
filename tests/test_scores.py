"""One row a prompt under a condition, and what tables of them tell: on the tiny random models, and on rows written by hand."""

import pandas as pd
import pytest
from conftest import HARMFUL, HARMLESS

from lib.effects import controls
from lib.evaluation import divergence, first_slots, refusal_log_odds
from lib.scores import bounded, named, per_prompt, score, short_of, summary, tell
from lib.statistics import bootstrap, rate
from lib.steering import ablate

pytestmark = pytest.mark.usefixtures("store")
SIDES = dict(harmful=HARMFUL, harmless=HARMLESS)


@pytest.fixture
def randoms(candidates, direction):
    return [[ablate(other)] for other in controls(candidates, direction, 3, seed=0)]


def test_scores_are_those_of_first_slots(chatty_mdlm, randoms):
    rows = score(chatty_mdlm, [(dict(kind="baseline"), [[]]), (dict(kind="random"), randoms[:2])], SIDES)
    assert list(rows) == ["kind", "side", "prompt", "draw", "p", "likely", "answered", "divergence"] and len(rows) == 2 * 8
    unsteered = rows[rows.kind == "baseline"]
    assert (unsteered[unsteered.side == "harmless"].divergence == 0).all() and (unsteered.answered == ~unsteered.likely).all()
    for row in rows[rows.kind == "random"].itertuples():
        asked = [SIDES[row.side][row.prompt]]
        plain, steered = first_slots(chatty_mdlm, asked), first_slots(chatty_mdlm, asked, randoms[row.draw])
        before, p = (refusal_log_odds(chatty_mdlm, scored).sigmoid().item() for scored in (plain, steered))
        assert row.draw == row.prompt % 2 and row.p == pytest.approx(p, abs=1e-4)
        assert (row.likely, row.answered) == (p > 0.5, max(before, p) <= 0.5)
        damage = divergence(plain, steered).item() if row.side == "harmless" else float("nan")
        assert row.divergence == pytest.approx(damage, abs=1e-3, nan_ok=True)


def test_languages_are_dealt_out_each_for_itself(chatty_mdlm, randoms):
    prompts = dict(en=SIDES, zh=dict(harmful=HARMFUL[:3]))
    rows = score(chatty_mdlm, named(dict(baseline=[[]], random=randoms[:2]), part="post"), prompts)
    assert list(rows)[:5] == ["condition", "part", "language", "side", "prompt"] and set(rows.part) == {"post"}
    assert rows[(rows.condition == "random") & (rows.language == "zh")].draw.tolist() == [0, 1, 0]
    apart = score(chatty_mdlm, named(dict(random=randoms[:2])), prompts["zh"])
    known = rows[(rows.condition == "random") & (rows.language == "zh")].p.tolist()
    assert apart.p.tolist() == pytest.approx(known, abs=1e-6) and "language" not in apart
    table = summary(rows, ["condition", "language"])
    assert table.n_harmful.tolist() == [4, 3, 4, 3] and table.n_harmless.tolist() == [4, 0, 4, 0]
    assert table.divergence.notna().tolist() == [True, False] * 2 and (table.p_lo <= table.p).all()


def test_draws_beyond_the_prompts_are_left_out(chatty_mdlm, randoms):
    rows = score(chatty_mdlm, [(dict(kind="random"), randoms)], {"harmful": HARMFUL[:2]})
    assert rows.draw.tolist() == [0, 1]


# --- tables -------------------------------------------------------------------------------------------------------------------


def test_a_summary_has_a_row_for_each_group_in_order():
    p, hit, cost = [0.1, 0.2, 0.4], [True, False, True], [0.5, 0.1, 9.0]
    harmful = [dict(side="harmful", p=x, refused=y, answered=False) for x, y in zip(p, hit, strict=True)]
    harmless = [dict(side="harmless", p=x, divergence=d, answered=x < 0.3) for x, d in zip(p, cost, strict=True)]
    rows = [dict(layer=at) | row for at in (3, None) for row in harmful]
    rows = pd.DataFrame([*rows, *(dict(layer=3) | row for row in harmless), dict(layer=None) | harmless[0]])
    table = summary(rows, ["layer"])
    assert table.layer.iloc[0] == 3 and pd.isna(table.layer.iloc[1]) and table.n_harmful.tolist() == [3, 3]
    for name, value in (bootstrap(p).columns("p") | rate(hit).columns("refused")).items():
        assert table[name].tolist() == [value, value]
    assert table.n_harmless.tolist() == [3, 1] and table.divergence.isna().tolist() == [False, True]  # one has no interval
    assert table.n_answered.tolist() == [2, 1] and table.divergence_answered.iloc[0] == pytest.approx(0.3)
    assert "nats" not in table and "likely" not in table
    told = tell(table).splitlines()
    assert told[0].startswith("3: refusal score 0.") and "n = 3" in told[0] and "if answered 0.3" in told[0]
    assert len(told) == 2 and "divergence" not in told[1]


def test_values_of_a_prompt_are_averaged_over_what_is_asked():
    rows = pd.DataFrame(
        [dict(kind=k, layer=layer, prompt=p, refused=(layer + p) % 2 == 0) for k in "ab" for layer in range(4) for p in (1, 0)]
    ).assign(side="harmful")
    rows = pd.concat([rows, rows.assign(side="harmless", refused=True)])
    assert per_prompt(rows, "refused", kind="a", layer=1).tolist() == [False, True]
    assert per_prompt(rows, "refused", kind="a", layer=1).dtype == bool
    assert per_prompt(rows, "refused", kind=["a", "b"], layer=range(3)).tolist() == pytest.approx([2 / 3, 1 / 3])


# --- claims -------------------------------------------------------------------------------------------------------------------


def made(condition: str, language: str, divergence: float, answered: bool = True) -> pd.DataFrame:
    sides = dict(side=["harmful", "harmless"], divergence=[None, divergence])
    return pd.DataFrame(sides).assign(condition=condition, language=language, prompt=0, p=divergence, answered=answered)


def test_an_effect_bought_by_damage_is_none():
    rows = pd.concat([made("baseline", "en", 0), made("baseline", "zh", 0), made("cut", "en", 0.2), made("cut", "zh", 0.4)])
    kept = bounded(rows, "cut", 0.3, "cut, within the bound")
    assert kept.groupby("language").p.max().to_dict() == dict(en=0.2, zh=0)
    assert set(kept.condition) == {"cut, within the bound"}
    assert (bounded(rows, "not there", 0.3, "x").p == 0).all()
    refused = made("cut", "en", 9.0, answered=False).assign(prompt=1)  # changed because its refusal goes
    assert bounded(pd.concat([rows, refused]), "cut", 0.3, "x").query("language == 'en'").p.max() == 9


def test_a_margin_is_a_share_of_the_effect():
    rows = pd.concat([made("baseline", "en", 1), made("cut", "en", 0.2), made("idle", "en", 1)])
    assert short_of(rows, "cut", 0.25, "most").p.tolist() == pytest.approx([0.4, 0.4])
    assert (short_of(rows, "idle", 0.25, "most").p == 1).all() and (
        short_of(rows, "cut", 0.25, "most").condition == "most"
    ).all()
