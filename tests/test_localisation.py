"""Interventions go where they are told, and rows say what was done: on the tiny random models."""

import pytest
import torch
from conftest import HARMFUL, HARMLESS

from lib import localisation as loc
from lib.effects import BASELINE, compare
from lib.hooking import Site, capture
from lib.prompts import encode
from lib.steering import Scope, StepState, steering

PROMPTS = {"harmful": HARMFUL, "harmless": HARMLESS}
pytestmark = pytest.mark.usefixtures("store")


def states(lm, interventions, prompts=HARMFUL):
    ids, mask = encode(lm, prompts)
    sites = [Site(layer, name) for layer in range(lm.n_layers) for name in loc.SUB_SITES]
    with steering(lm, interventions) as at:
        at(StepState(torch.ones_like(ids), ids < 0))
        return capture(lm, ids, sites, mask)


# --- interventions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ablate", "clamp"])
def test_an_operation_is_placed_and_moved(chatty_mdlm, direction, form):
    steer = loc.placed(direction, form, [1, 3])
    assert steer.layers == (1, 3) and steer.operation == form and loc.placed(direction, form).layers is None
    [[late]] = loc.moved([[steer]], layers=(2,), scope=Scope(steps=slice(0, 1)))
    assert late.layers == (2,) and late.scope.steps == slice(0, 1) and (late.direction, late.sites) == (direction, steer.sites)
    plain, changed = (states(chatty_mdlm, steers) for steers in ([], [late]))
    assert torch.equal(plain[Site(1, "resid_post")], changed[Site(1, "resid_post")])
    goal = 0 if form == "ablate" else direction.reference[2, 0]
    torch.testing.assert_close(
        changed[Site(2)] @ direction.basis[0], torch.full(plain[Site(2)].shape[:2], float(goal)), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("site", loc.SUB_SITES)
def test_a_component_goes_to_the_harmless_mean_of_its_site(chatty_mdlm, direction, site):
    means = loc.site_means(chatty_mdlm, -1, HARMLESS)
    for form in ("ablate", "clamp"):
        found = states(chatty_mdlm, loc.at_sites(direction, form, [site], means, [1, 2]))
        for layer in (1, 2):
            goal = float(means[site][layer] @ direction.basis[0].double()) if form == "clamp" else 0.0
            torch.testing.assert_close(
                found[Site(layer, site)] @ direction.basis[0], torch.full(found[Site(0)].shape[:2], goal), atol=1e-4, rtol=0
            )
    both = loc.at_sites(direction, "clamp", ["attn_out", "mlp_out"], means, range(4))
    assert [steer.sites for steer in both] == [("attn_out",), ("mlp_out",)] and both[0].layers == (0, 1, 2, 3)


def test_every_layer_loses_its_own_direction(chatty_mdlm):
    pooled = loc.over_prompt(chatty_mdlm, -1, HARMFUL, HARMLESS)
    found = states(chatty_mdlm, loc.layer_wise(pooled, "ablate", first=1))
    for layer in range(chatty_mdlm.n_layers):
        unit = torch.nn.functional.normalize(pooled.difference[0, layer], dim=0).float()
        assert ((found[Site(layer)] @ unit).abs().max() < 1e-4) == (layer >= 1)
    vectors = torch.randn(4, chatty_mdlm.d_model, generator=torch.Generator().manual_seed(0))
    others = loc.layer_wise(pooled, "clamp", vectors=vectors)
    assert [steer.layers for steer in others] == [(0,), (1,), (2,), (3,)]
    for layer, steer in enumerate(others):
        unit = torch.nn.functional.normalize(vectors[layer], dim=0)
        torch.testing.assert_close(steer.direction.basis[0], unit)
        torch.testing.assert_close(steer.to[layer, 0], (pooled.harmless_mean[0, layer] @ unit.double()).float())


def test_a_layer_whose_means_are_equal_has_no_direction(chatty_mdlm):
    last = loc.at_position(chatty_mdlm, -1, HARMFUL, HARMLESS)  # at layer 0 the embedding of a template token
    assert [steer.layers for steer in loc.layer_wise(last, "ablate")] == [(1,), (2,), (3,)]


# --- extraction ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatty", "chatty_mdlm"])
def test_means_are_those_of_prompts_one_by_one(request, name):
    lm = request.getfixturevalue(name)
    for position in (1, -2):
        means = loc.site_means(lm, position, HARMFUL)
        assert set(means) == {*loc.SUB_SITES, "pooled"}
        alone = [states(lm, [], [prompt]) for prompt in HARMFUL]
        for layer in range(lm.n_layers):
            for site in loc.SUB_SITES:
                expected = torch.stack([found[Site(layer, site)][0, position] for found in alone]).double().mean(0)
                torch.testing.assert_close(means[site][layer], expected, atol=1e-5, rtol=1e-4)
            pooled = torch.stack([found[Site(layer)][0].mean(0) for found in alone]).double().mean(0)
            torch.testing.assert_close(means["pooled"][layer], pooled, atol=1e-5, rtol=1e-4)


def test_one_position_is_what_mean_difference_finds(chatty_mdlm, candidates):
    found = loc.at_position(chatty_mdlm, 1, HARMFUL, HARMLESS)
    at = candidates.positions.index(1)
    torch.testing.assert_close(found.difference[0], candidates.difference[at], atol=1e-5, rtol=1e-4)
    assert found.positions == (1,) and loc.over_prompt(chatty_mdlm, 1, HARMFUL, HARMLESS).positions == (None,)
    found.direction(2, 1).check(chatty_mdlm)


# --- texts --------------------------------------------------------------------------------------------------------------------


def test_texts_are_judged_as_in_effects(chatty_mdlm, chatty, direction):
    steer = [[loc.placed(direction, "ablate")]]
    decoding = dict(gen_length=6, steps=3, block_length=6)
    rows = loc.write(chatty_mdlm, [(dict(kind="baseline"), [[]]), (dict(kind="ablate"), steer)], PROMPTS, chatty, **decoding)
    known = compare(chatty_mdlm, chatty, {BASELINE: [[]], "ablate": steer}, {"en": PROMPTS}, **decoding)
    assert rows.refused.tolist() == known.refused.tolist() and rows.prompt.tolist() == known.prompt.tolist()
    harmless = rows.side == "harmless"
    assert rows[harmless].nats.tolist() == pytest.approx(known[harmless].nats.tolist(), nan_ok=True)
    assert rows[~harmless].nats.isna().all() and "text" not in rows


def test_a_window_without_steps_changes_nothing(chatty_mdlm, chatty, direction, monkeypatch):
    seen = []
    monkeypatch.setattr(loc, "is_refusal", lambda text: seen.append(text) or False)
    steer = [[loc.placed(direction, "ablate")]]
    windows = {"none": (0, 0), "first": (0, 1), "all": (0, 3)}
    conditions = [(dict(window=name), loc.moved(steer, scope=Scope(steps=slice(a, b)))) for name, (a, b) in windows.items()]
    conditions.append((dict(window="unsteered"), [[]]))
    loc.write(chatty_mdlm, conditions, {"harmful": HARMFUL}, chatty, gen_length=6, steps=3, block_length=6)
    none, first, whole, unsteered = (seen[4 * i : 4 * i + 4] for i in range(4))
    assert none == unsteered != whole and first != none
