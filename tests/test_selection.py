"""Selection keeps its whole table, knows why it rejects, and never measures a cell twice; on the tiny model."""

import pytest
import torch
from conftest import HARMFUL, HARMLESS

from lib import selection, subspace
from lib.extraction import activations
from lib.hooking import Site, capture
from lib.selection import NothingSelected, confirm, discrimination, operate, select
from lib.steering import StepState, steering

pytestmark = pytest.mark.usefixtures("store")
LOOSE = dict(positions=(-1, 1), stride=2, n_coarse=2, n_refined=2, max_divergence=1e9, min_auroc=0.0)


def test_the_whole_table_is_kept_best_first(chatty_mdlm, candidates):
    chosen = select(chatty_mdlm, candidates, HARMFUL, HARMLESS, **LOOSE)
    table = chosen.table
    assert {"layer", "position", "operation", "auroc", "bypass", "induce", "divergence", "kept", "reason"} <= set(table.columns)
    assert not table.duplicated(["layer", "position", "operation"]).any()
    assert set(table[table.stage == "coarse"].layer) <= {1, 3} and set(table.position) <= {-1, 1}
    kept = table[table.kept]
    assert kept.bypass.is_monotonic_increasing and (kept.stage == "refined").all() and (kept.reason == "").all()
    assert (table[~table.kept].reason != "").all()
    assert chosen.direction().provenance["scores"]["bypass"] == pytest.approx(table.bypass[0])
    assert chosen.finalists.operation.is_unique


def test_a_selection_made_before_is_read(chatty_mdlm, candidates, monkeypatch):
    first = select(chatty_mdlm, candidates, HARMFUL, HARMLESS, **LOOSE)
    monkeypatch.setattr(selection, "first_slots", None)
    assert select(chatty_mdlm, candidates, HARMFUL, HARMLESS, **LOOSE).table.equals(first.table)


def test_bounds_are_kept_and_named(chatty_mdlm, candidates):
    free = select(chatty_mdlm, candidates, HARMFUL, HARMLESS, **LOOSE).table
    middle = float(free[free.kept].divergence.median())
    bound = select(chatty_mdlm, candidates, HARMFUL, HARMLESS, **LOOSE | dict(max_divergence=middle)).table
    assert (bound[bound.kept].divergence <= middle).all()
    assert (bound.reason == f"divergence > {middle}").any()
    with pytest.raises(NothingSelected, match=r"the gentlest, layer \d position -?\d .* has divergence"):
        select(chatty_mdlm, candidates, HARMFUL, HARMLESS, **LOOSE | dict(max_divergence=-1.0))
    with pytest.raises(NothingSelected, match="induce >= 99"):
        select(chatty_mdlm, candidates, HARMFUL, HARMLESS, **LOOSE | dict(min_induce=99.0))
    with pytest.raises(ValueError, match=r"positions \[7\] are not in the template"):
        select(chatty_mdlm, candidates, HARMFUL, HARMLESS, **LOOSE | dict(positions=(7,)))
    with pytest.raises(NothingSelected, match="tells harmful from harmless"):
        select(chatty_mdlm, candidates, HARMFUL, HARMLESS, **LOOSE | dict(min_auroc=1.1))


def test_texts_have_the_last_word(chatty_mdlm, candidates, monkeypatch):
    chosen = select(chatty_mdlm, candidates, HARMFUL, HARMLESS, **LOOSE)
    last = chosen.finalists.operation.iloc[-1]
    gentle = chosen.intervention(int(chosen.table.index[chosen.table.operation == last][0]))

    def respond(lm, prompts, interventions, **decoding):
        mine = interventions[0].sites == gentle.sites and interventions[0].operation == gentle.operation
        return ["fine" if mine else "I'm sorry"] * len(prompts)

    monkeypatch.setattr(selection, "respond", respond)
    confirmed = confirm(chatty_mdlm, chosen, HARMFUL)
    assert len(chosen.finalists) > 1 and confirmed.best.operation == last and confirmed.best.refused == 0
    assert confirmed.table.refused.notna().sum() == len(chosen.finalists)
    assert len(confirmed.table) == len(chosen.table)


def test_a_separating_cell_has_auroc_one(chatty_mdlm, candidates):
    areas = discrimination(chatty_mdlm, candidates, HARMFUL, HARMLESS).set_index(["layer", "position"]).auroc
    x, y = activations(chatty_mdlm, HARMFUL), activations(chatty_mdlm, HARMLESS)
    assert set(areas.index) == set(candidates.cells) and (0, -1) not in areas.index  # the embedding of a template token
    for p, position in enumerate(candidates.positions):
        for layer in range(1, chatty_mdlm.n_layers):
            d = candidates.difference[p, layer].float()
            pairs = [(float(a > b) + 0.5 * float(a == b)) for a in x[:, p, layer] @ d for b in y[:, p, layer] @ d]
            assert areas[layer, position] == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize(
    ("operation", "acts"), [("ablate everywhere", {0, 1, 2, 3}), ("ablate at its layer", {2}), ("clamp from its layer", {2, 3})]
)
def test_operations_act_where_they_say(chatty_mdlm, candidates, operation, acts):
    direction, ids = candidates.direction(2, -1), torch.randint(3, 90, (1, 8), generator=torch.Generator().manual_seed(0))
    with steering(chatty_mdlm, [operate(direction, operation)]) as at:
        at(StepState(torch.ones_like(ids), ids < 0))
        states = capture(chatty_mdlm, ids, [Site(layer) for layer in range(4)])
    target = direction.reference[:, 0] if operation.startswith("clamp") else torch.zeros(4)
    for layer in range(4):
        held = ((states[Site(layer)] @ direction.basis[0] - target[layer]).abs() < 1e-4).all()
        assert held == (layer in acts)


def test_an_unknown_operation_names_the_known(candidates):
    with pytest.raises(ValueError, match="use one of ablate everywhere"):
        operate(candidates.direction(2, -1), "ablate")


def test_removing_more_dimensions_contains_removing_fewer(chatty_mdlm, candidates):
    direction = candidates.direction(2, -1)
    x = activations(chatty_mdlm, HARMFUL + HARMLESS)[:, -1, 2]
    inputs = dict(lm=chatty_mdlm, candidates=candidates, direction=direction, operation="ablate everywhere", x=x)
    one = subspace.ablated_dimensions(1, "difference first", harmful=HARMFUL, harmless=HARMLESS, **inputs)
    alone = selection.removal_scores(chatty_mdlm, operate(direction, "ablate everywhere"), HARMFUL, HARMLESS)
    assert one == pytest.approx(alone, abs=1e-5)
    other = subspace.ablated_dimensions(1, "without the difference", harmful=HARMFUL, harmless=HARMLESS, **inputs)
    assert other["divergence"] != pytest.approx(one["divergence"], abs=1e-6)
