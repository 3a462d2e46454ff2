"""A verdict follows from numbers: side, p-value, correction; a claim is told once, and travels with its figure."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lib.claims import COLUMNS, against_null, between, collect, compared, untestable
from lib.figures import save
from lib.statistics import Controlled, bootstrap, permutation_pvalue, wilson

ABOUT = ("Some claim.", "arXiv 0000.00000", "toy", "share refused")


def made(id: str, effect, control, claimed="lower", paired=True) -> dict:
    return compared(id, *ABOUT, effect, control, "baseline", claimed, paired)


def keep(folder, figure: str, *claims: dict) -> None:
    fig, _ = plt.subplots()
    save(fig, figure, pd.DataFrame(dict(x=[1])), claims=claims, directory=folder)
    plt.close(fig)


def test_a_row_has_effect_control_and_p():
    row = made("refusal", [False] * 9 + [True], [True] * 10)
    expected = wilson(1, 10)
    assert (row["effect"], row["effect_lo"], row["effect_hi"]) == (expected.value, expected.lo, expected.hi)
    assert (row["control"], row["n"], row["n_control"]) == (1.0, 10, 10)
    assert row["p"] == permutation_pvalue([0.0] * 9 + [1.0], [1.0] * 10, paired=True) < 0.01
    scores = np.linspace(0, 1, 12)
    row = made("scores", scores, scores + 1)
    assert row["effect_lo"] == bootstrap(scores).lo


def test_verdicts_follow_side_and_correction(tmp_path):
    strong, weak = ([False] * 12, [True] * 12), ([False] * 6 + [True] * 6, [True] * 12)
    keep(tmp_path, "first", made("a", *strong), made("b", *strong, claimed="higher"), made("c", *weak))
    keep(tmp_path, "second", untestable("d", "Some claim.", "arXiv 0000.00000", "toy", "needs LLaDA-8B"))
    table = collect(tmp_path).set_index("id")
    assert table.verdict.to_dict() == dict(a="reproduced", b="not reproduced", c="reproduced", d="not testable here")
    assert table.figure.to_dict() == dict(a="first", b="first", c="first", d="second") and table.why["d"] == "needs LLaDA-8B"
    assert table.p_holm["a"] == pytest.approx(3 * table.p["a"])
    many = [made(f"n{i:02d}", *weak) for i in range(30)]
    keep(tmp_path, "third", *many)
    assert set(collect(tmp_path).set_index("id").verdict[[row["id"] for row in many]]) == {"not reproduced"}  # .03 x 30


def test_a_statistic_stands_against_its_null(tmp_path):
    found = Controlled(0.9, 0.8, 0.95, 40, null_mean=0.5, null_q95=0.7, pvalue=0.01)
    keep(tmp_path, "first", against_null("a", *ABOUT[:3], "cosine", found, "shuffled labels"))
    row = collect(tmp_path).iloc[0]
    assert list(collect(tmp_path).columns) == COLUMNS
    assert (row.effect, row.control, row.control_hi, row.n, row.verdict) == (0.9, 0.5, 0.7, 40, "reproduced")


def test_a_claim_is_told_once(tmp_path):
    for figure in ("first", "second"):
        keep(tmp_path, figure, made("a", [False] * 5, [True] * 5))
    with pytest.raises(ValueError, match=r"\['a'\] are made by more than one figure"):
        collect(tmp_path)


def test_figures_without_claims_have_none(tmp_path):
    keep(tmp_path, "first")
    assert json.loads((tmp_path / "first.json").read_text())["claims"] == [] and collect(tmp_path).empty


def test_conditions_are_paired_where_their_prompts_are_the_same():
    def rows(condition: str, language: str, refused: list[bool]) -> pd.DataFrame:
        order = list(range(len(refused)))[::-1]  # kept in any order
        cells = dict(condition=condition, language=language, side="harmful")
        return pd.DataFrame([dict(prompt=i, refused=refused[i]) | cells for i in order])

    before, after = [True] * 8 + [False] * 2, [False] * 10
    table = pd.concat([rows("a", "en", after), rows("b", "en", before), rows("a", "zh", after), rows("b", "zh", before[:9])])
    english, chinese = between(table, "x", *ABOUT[:3], effect="a", control="b", claimed="lower")
    assert (english["id"], chinese["id"], english["claim"]) == ("x-en", "x-zh", "Some claim. (en)")
    assert english["p"] == permutation_pvalue(np.array(after, float), np.array(before, float), paired=True)
    assert chinese["p"] == permutation_pvalue(np.array(after, float), np.array(before[:9], float), paired=False)
    assert english["measure"] == "refused, harmful prompts"
