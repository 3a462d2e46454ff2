"""Where else a direction is found and works: exact on tiny random models, and on tables written by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import HARMFUL, HARMLESS
from sklearn.metrics import roc_auc_score

from lib.extraction import activations, mean_difference
from lib.prompts import Contrast, template
from lib.transfer import (
    by_role,
    candidates_by_source,
    choose,
    instruction_dependence,
    language_cosines,
    separation,
)

pytestmark = pytest.mark.usefixtures("store")
TRAIN = dict(
    en=Contrast("en", "train", HARMFUL, HARMLESS), zh=Contrast("zh", "train", HARMFUL[::-1], HARMLESS[1:] + HARMLESS[:1])
)
TEST = dict(en=dict(harmful=HARMFUL, harmless=HARMLESS), zh=dict(harmful=HARMFUL[:3], harmless=HARMLESS[:2]))


def test_nothing_before_the_instruction_depends_on_it_in_a_causal_model(chatty, chatty_mdlm):
    for lm in (chatty, chatty_mdlm):
        table = instruction_dependence(lm, HARMFUL + HARMLESS)
        assert set(table.position) == set(template(lm).positions) and set(table.prompt) == set(range(1, 8))
        assert (table[table.position < 0].groupby("position").deviation.max() > 0).all()
        assert (table[table.position >= 0].deviation == 0).all() == lm.causal


def test_how_far_an_activation_moves(chatty_mdlm):
    table = instruction_dependence(chatty_mdlm, HARMFUL[:2]).set_index("position").deviation
    x = activations(chatty_mdlm, HARMFUL[:2])  # [n, p, l, d]
    for p, position in enumerate(template(chatty_mdlm).positions):
        expected = (x[1, p, 1:] - x[0, p, 1:]).norm(dim=-1) / x[0, p, 1:].norm(dim=-1)
        assert table[position] == pytest.approx(expected.max().item(), rel=1e-3)


def test_separation_is_held_out_and_centred_within_languages(chatty_mdlm, chatty, candidates):
    table = separation(chatty_mdlm, candidates, TEST, [0, 2], n_draws=3).set_index(["position", "layer"])
    assert len(table) == 2 * len(candidates.positions)
    d = candidates.difference[-1, 2].float()
    scores, labels = [], []
    for sides in TEST.values():
        a, b = (activations(chatty_mdlm, sides[side])[:, -1, 2] @ d for side in ("harmful", "harmless"))
        centre = (a.mean() + b.mean()) / 2
        scores += [*(a - centre).tolist(), *(b - centre).tolist()]
        labels += [1] * len(a) + [0] * len(b)
    assert table.auroc[-1, 2] == pytest.approx(roc_auc_score(labels, scores)) and table.n[-1, 2] == 13
    assert np.isnan(table.auroc[-1, 0]) and table.null_q95[-1, 2] >= 0.5  # the embedding of a template token has no direction
    causal = separation(chatty, mean_difference(chatty, HARMFUL, HARMLESS), TEST, [2], n_draws=3)
    assert causal[causal.position >= 0].auroc.isna().all() and causal[causal.position < 0].auroc.notna().all()


def test_the_tightest_bound_that_leaves_a_choice(chatty_mdlm, candidates):
    asked = (chatty_mdlm, candidates, HARMFUL, HARMLESS)
    found = choose(*asked, [1], 2, (-1.0, 1e9))
    assert found.position == 1 and found.provenance["max_divergence"] == 1e9 and found.provenance["operation"]
    assert choose(*asked, [1], 2, (-1.0,)) is None


def test_roles_follow_the_tested_language():
    pairs = [(source, language) for source in ("baseline", "en", "zh") for language in ("en", "zh")]
    rows = pd.DataFrame(pairs, columns=["source", "language"])
    roles = by_role(rows.assign(condition=rows.source))
    single = roles[roles.condition.isin(["own", "other"])]
    assert len(roles) == len(rows) + 4 and ((single.source == single.language) == (single.condition == "own")).all()


def test_pooled_means_are_those_of_all_prompts(chatty_mdlm):
    sources = candidates_by_source(chatty_mdlm, TRAIN)
    assert list(sources) == ["en", "zh", "pooled"]
    every = [sum((getattr(pairs, side) for pairs in TRAIN.values()), ()) for side in ("harmful", "harmless")]
    torch.testing.assert_close(sources["pooled"].difference, mean_difference(chatty_mdlm, *every).difference)
    assert sources["zh"].difference.equal(mean_difference(chatty_mdlm, TRAIN["zh"].harmful, TRAIN["zh"].harmless).difference)
    assert sources["pooled"].provenance["pooled"] == ["en", "zh"]


def test_cosines_are_those_of_mean_differences(chatty_mdlm, chatty):
    table = language_cosines(chatty_mdlm, TRAIN["en"], TRAIN["zh"], resamples=50).set_index(["layer", "position"])
    sources = candidates_by_source(chatty_mdlm, TRAIN)
    assert set(table.index) == set(sources["en"].cells)
    for (layer, position), row in table.iterrows():
        p = sources["en"].positions.index(position)
        u, v = (sources[language].difference[p, layer] for language in ("en", "zh"))
        assert row.cosine == pytest.approx(torch.cosine_similarity(u, v, dim=0).item(), abs=1e-4)
        assert row.cosine_lo <= row.cosine <= row.cosine_hi and abs(row.null_mean) < 0.6
    same = language_cosines(chatty_mdlm, TRAIN["en"], TRAIN["en"], resamples=50)
    assert (same.cosine > 1 - 1e-9).all() and np.allclose(same.other, same.ceiling_en)  # other requests of the same language
    causal = language_cosines(chatty, TRAIN["en"], TRAIN["zh"], resamples=5)
    assert (causal.position < 0).all()
