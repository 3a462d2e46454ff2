"""A planted map is found, a model's map to itself changes nothing, and a carried direction has the target's length."""

from dataclasses import replace

import pytest
import torch
from conftest import HARMFUL, HARMLESS

from lib.evaluation import first_slots, refusal_log_odds
from lib.extraction import Candidates, DirectionMismatch, mean_difference
from lib.mapping import REMOVAL, agreement, best_map, carry, dose_response, fit, remove, same_depth, stream, ways
from lib.prompts import Contrast
from lib.selection import operate, removal_scores
from lib.steering import add

FITTING = ("feed the birds", "find a good book", "fold a paper plane", "grow some basil")
HELD_OUT = ("sing a song", "count the sheep", "paint the fence")
SIDES = ("harmful", "harmless", "fitting", "held_out")
PAIRS = Contrast("en", "train", HARMFUL, HARMLESS)


@pytest.fixture(scope="module")
def own(chatty_mdlm):
    return stream(chatty_mdlm, PAIRS, FITTING, HELD_OUT)


@pytest.fixture(scope="module")
def parent(chatty):
    return stream(chatty, PAIRS, FITTING, HELD_OUT)


def planted(source, matrix):
    """The stream of a model that sees `matrix` [e, d] times what `source` sees, and a constant of its own."""

    def moved(x):
        return (x.double() @ matrix.double().T + 3).to(x.dtype)

    means = (moved(source.candidates.harmful_mean), moved(source.candidates.harmless_mean))
    candidates = Candidates(*means, source.candidates.positions, "planted", {})
    return replace(source, **{s: moved(getattr(source, s)) for s in SIDES}, candidates=candidates)


def test_a_stream_gives_the_candidates_of_its_prompts(chatty_mdlm, own):
    expected = mean_difference(chatty_mdlm, HARMFUL, HARMLESS)
    torch.testing.assert_close(own.candidates.difference, expected.difference, atol=1e-6, rtol=1e-5)
    assert own.candidates.positions == expected.positions and own.candidates.fingerprint == chatty_mdlm.fingerprint
    assert (own.n_layers, own.d_model, len(own.held_out)) == (4, 32, 3)


def test_a_planted_matrix_is_found():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 8, generator=generator)
    seen, held = (torch.randn(n, 3, 8, generator=generator) + torch.arange(3.0)[:, None] * 100 for n in (40, 6))
    found = fit(seen, seen @ matrix.T - 7, held, held @ matrix.T - 7)
    torch.testing.assert_close(found.matrix, matrix, atol=1e-3, rtol=1e-3)
    assert found.explained > 0.999
    noise = torch.randn(40, 3, 5, generator=generator), torch.randn(6, 3, 5, generator=generator)
    assert fit(seen, noise[0], held, noise[1]).explained < 0.2


def test_a_planted_map_between_streams_carries_the_direction(parent):
    """Few prompts span few dimensions: the map is found where they vary, so the carried direction is one of those."""
    matrix = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    target = planted(parent, matrix)
    found = best_map(parent, target, 2)
    x = (parent.fitting[:, -5:, 2] - parent.fitting[:, -5:, 2].mean(0)).flatten(0, 1)
    torch.testing.assert_close(x @ found.matrix.T, x @ matrix.T, atol=0.02 * (x @ matrix.T).abs().max().item(), rtol=0)
    direction = parent.candidates.direction(2, -1, x[-1:])
    carried = carry(direction, target.candidates, 2, found.matrix)
    assert torch.cosine_similarity(carried.basis[0], matrix @ x[-1], dim=0) > 0.99
    assert carried.fingerprint == "planted" and torch.equal(carried.scale, target.candidates.direction(2, -1).scale)
    (mapped,) = agreement("a", "b", 2, dict(a=parent, b=target), -1, resamples=50)
    assert mapped["how"] == "mapped" and mapped["explained"] == found.explained  # other widths: nothing to compare as it is


def test_the_identity_map_gives_the_raw_result(chatty_mdlm, own):
    direction = own.candidates.direction(2, -1)
    raw, mapped = (carry(direction, own.candidates, 2, matrix) for matrix in (None, torch.eye(32)))
    assert torch.equal(raw.basis, mapped.basis) and torch.allclose(raw.basis, direction.basis, atol=1e-6)
    for kind in ("removed", "added"):
        scores = [dose_response(kind, 1.0, chatty_mdlm, d, HARMFUL, HARMLESS) for d in (direction, raw, mapped)]
        assert scores[1] == scores[2] and scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_a_model_agrees_with_itself(own):
    raw, mapped = agreement("a", "a", 2, dict(a=own), -1, resamples=200)
    assert raw["value"] == pytest.approx(1) and raw["lo"] <= raw["value"] <= raw["hi"] and raw["n"] == len(HARMFUL)
    assert mapped["value"] > 0.5 and abs(raw["null_mean"]) < 0.3 and raw["pvalue"] < 0.2


def test_ways_lead_to_the_same_place(own, parent):
    found = ways(own, parent, 2, -1, n_draws=3)
    assert {how: len(directions) for how, directions in found.items()} == {
        "own": 1, "raw": 1, "mapped": 1, "random mapped": 3, "random": 3,
    }  # fmt: skip
    assert torch.equal(found["own"][0].basis, parent.candidates.direction(2, -1).basis)
    torch.testing.assert_close(found["raw"][0].basis, own.candidates.direction(2, -1).basis)
    matrix = best_map(own, parent, 2).matrix
    along = found["random"][1].basis @ matrix.T  # the same draws, in streams of one width
    assert torch.cosine_similarity(found["random mapped"][1].basis, along).item() == pytest.approx(1, abs=1e-5)
    for directions in found.values():
        for direction in directions:
            assert (direction.layer, direction.position, direction.fingerprint) == (2, -1, parent.candidates.fingerprint)
            assert torch.equal(direction.scale, found["own"][0].scale)
    narrow = planted(parent, torch.randn(24, 32, generator=torch.Generator().manual_seed(1)))
    assert "raw" not in ways(parent, narrow, 2, -1, n_draws=1)


def test_a_dose_is_the_distance_of_the_targets_class_means(chatty, own, parent):
    carried = carry(own.candidates.direction(1, -1), parent.candidates, 2)
    length = parent.candidates.difference[parent.at(-1), 2].norm().item()
    assert carried.layer == 2 and carried.scale[2].item() == pytest.approx(length, rel=1e-6)
    shift = add(carried, 0.5).edit(2, chatty.device)(torch.zeros(1, 1, 32))
    torch.testing.assert_close(shift[0, 0], 0.5 * length * own.candidates.direction(1, -1).basis[0])
    row = dose_response("removed", 0.5, chatty, carried, HARMFUL, HARMLESS)
    down = removal_scores(chatty, remove(carried, 0.5), HARMFUL, HARMLESS)
    assert (row["score"], row["score_lo"], row["divergence_hi"]) == (
        down["bypass_p"],
        down["bypass_p_lo"],
        down["divergence_hi"],
    )
    row = dose_response("added", 0.5, chatty, carried, HARMFUL, HARMLESS[:3])
    up = refusal_log_odds(chatty, first_slots(chatty, HARMLESS[:3], [add(carried, 0.5)])).sigmoid()
    assert row["score"] == pytest.approx(up.mean().item()) and row["n"] == 3
    still = dose_response("removed", 0.0, chatty, carried, HARMFUL, HARMLESS)
    assert still["divergence"] == pytest.approx(0, abs=1e-6) and still["n"] == len(HARMFUL)
    assert torch.equal(first_slots(chatty, HARMLESS, [add(carried, 0.0)]), first_slots(chatty, HARMLESS))


def test_a_partial_removal_takes_its_share_of_the_change(own):
    direction, h = own.candidates.direction(2, -1), torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    whole = operate(direction, REMOVAL)
    for share in (0.25, 1.0):
        part = remove(direction, share)
        assert (part.layers, part.sites, part.scope) == (whole.layers, whole.sites, whole.scope)
        moved = part.edit(2, h.device)(h) - h
        torch.testing.assert_close(moved, share * (whole.edit(2, h.device)(h) - h))
    component = remove(direction).edit(3, h.device)(h) @ direction.basis[0]
    torch.testing.assert_close(component, direction.reference[3, 0].expand(2, 3), atol=1e-5, rtol=1e-5)
    assert remove(direction, 0.0).edit(2, h.device) is None


def test_other_widths_and_unmatched_templates_are_named(own, parent):
    wide = planted(parent, torch.randn(24, 32, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(DirectionMismatch, match="d = 32 in a stream of d = 24"):
        carry(own.candidates.direction(2, -1), wide.candidates, 2)
    before = replace(own, candidates=replace(own.candidates, positions=tuple(range(len(own.candidates.positions)))))
    with pytest.raises(ValueError, match="no position behind the instruction"):
        best_map(before, own, 2)


def test_depth_is_a_share_of_the_layers(own):
    deep = replace(own, harmful=own.harmful.repeat(1, 1, 3, 1))
    assert [same_depth(layer, deep, own) for layer in range(4)] == [0, 3, 6, 9]
    assert [same_depth(layer, own, deep) for layer in range(12)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
