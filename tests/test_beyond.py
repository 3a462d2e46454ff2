"""Reading at masked slots, subspaces found by gradient, and the defence: exact on tiny random models and hand-written tables."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_evaluation import HARMFUL, HARMLESS

from lib import masked_extraction
from lib.baselines import Asking
from lib.defence import gated, separation, threshold, watch
from lib.evaluation import CANVAS, divergence, first_slots, is_refusal, refusal_log_odds
from lib.extraction import activations, mean_difference, orthonormal
from lib.hooking import Site, capture
from lib.masked_extraction import REFUSAL, answers, masked_candidates, masked_slots, readings, slot_states
from lib.prompts import Contrast, contrast, encode
from lib.selection import operate
from lib.statistics import random_directions
from lib.subspace import learnt_subspace, paired_components

TEXTS = ("no, i can not do that", "yes", "it is a car", "boil some water, then wait")
TRAIN = {"en": Contrast("en", "train", HARMFUL, HARMLESS)}
PROMPTS = {"en": dict(harmful=HARMFUL, harmless=HARMLESS)}


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MDLM_RESULTS", str(tmp_path))


# --- masked slots -------------------------------------------------------------------------------------------------------------


def test_every_harmless_training_request_has_an_answer_and_refusals_refuse():
    own = answers("train")
    for language in ("en", "zh"):
        pairs = contrast(language, "train")
        assert all(own[request] for request in pairs.harmless) and not own.keys() & set(pairs.harmful)
        assert is_refusal(REFUSAL[language]) and not any(is_refusal(own[request]) for request in pairs.harmless)


def test_the_asked_share_of_slots_is_masked():
    for ratio, n in ((0.0, 1), (0.3, 5), (0.5, 8), (1.0, CANVAS)):
        assert masked_slots(ratio, 3).sum() == n
    assert torch.equal(masked_slots(0.5, 3), masked_slots(0.5, 3)) and not torch.equal(
        masked_slots(0.5, 3), masked_slots(0.5, 4)
    )
    assert (masked_slots(0.9, 3) | ~masked_slots(0.3, 3)).all()  # a higher ratio masks more of the same


def test_the_state_is_the_mean_over_masked_slots(chatty_mdlm):
    found = slot_states(chatty_mdlm, HARMFUL, TEXTS, 0.5, seed=7, batch_size=3)
    for i, (prompt, text) in enumerate(zip(HARMFUL, TEXTS, strict=True)):
        ids, mask = encode(chatty_mdlm, [prompt], CANVAS)
        tokens = chatty_mdlm.tokenizer(text).input_ids[:CANVAS]
        row = torch.tensor(tokens + [chatty_mdlm.eos_id] * (CANVAS - len(tokens)))
        masked = masked_slots(0.5, 7 + i)
        ids[0, -CANVAS:] = row.where(~masked, torch.tensor(chatty_mdlm.mask_id))
        for layer in range(chatty_mdlm.n_layers):
            h = capture(chatty_mdlm, ids, [Site(layer)], mask)[Site(layer)][0, -CANVAS:]
            torch.testing.assert_close(found[i, layer], h[masked].mean(0), atol=1e-4, rtol=1e-4)


def test_with_all_slots_masked_the_text_is_gone(chatty_mdlm):
    one, other = (slot_states(chatty_mdlm, HARMFUL, texts, 1.0) for texts in (TEXTS, TEXTS[::-1]))
    assert torch.equal(one, other)
    assert not torch.equal(*(slot_states(chatty_mdlm, HARMFUL, texts, 0.5) for texts in (TEXTS, TEXTS[::-1])))


def test_candidates_at_masked_slots(chatty_mdlm, monkeypatch):
    monkeypatch.setattr(masked_extraction, "answers", lambda split: dict(zip(HARMLESS, TEXTS, strict=True)))
    refused = [REFUSAL["en"]] * len(HARMFUL)
    for kind, prompts in (("prompts, texts", HARMFUL), ("texts", HARMLESS)):
        found = masked_candidates(chatty_mdlm, kind, 0.5, TRAIN)
        expected = slot_states(chatty_mdlm, prompts, refused, 0.5) - slot_states(chatty_mdlm, HARMLESS, TEXTS, 0.5)
        torch.testing.assert_close(found.difference[0].float(), expected.mean(0), atol=1e-4, rtol=1e-3)
        assert found.direction(2, None).position is None
    with pytest.raises(KeyError):
        masked_candidates(chatty_mdlm, "texts", 0.5, {"en": replace(TRAIN["en"], harmless=HARMFUL)})


def test_a_prompt_is_read_where_its_direction_was(chatty_mdlm):
    candidates = mean_difference(chatty_mdlm, HARMFUL, HARMLESS)
    x = activations(chatty_mdlm, HARMFUL)
    for position in (1, -1, -2):
        direction = candidates.direction(2, position)
        expected = x[:, candidates.positions.index(position), 2] @ direction.basis[0]
        assert readings(chatty_mdlm, direction, HARMFUL, batch_size=3) == pytest.approx(expected.tolist(), abs=1e-4)
    slots = replace(direction, position=None)
    expected = slot_states(chatty_mdlm, HARMFUL, TEXTS, 1.0)[:, 2] @ direction.basis[0]
    assert readings(chatty_mdlm, slots, HARMFUL, batch_size=3) == pytest.approx(expected.tolist(), abs=1e-4)


# --- subspaces ----------------------------------------------------------------------------------------------------------------


def test_paired_components_hold_planted_differences():
    generator = torch.Generator().manual_seed(0)
    axes = orthonormal(torch.randn(2, 12, generator=generator))
    harmless = torch.randn(30, 12, generator=generator) * 50  # what twins share is no part of their difference
    weights = torch.randn(30, 2, generator=generator) * torch.tensor([0.2, 0.5]) + torch.tensor([9.0, 0.0])
    found = paired_components(harmless + weights @ axes, harmless, 2)
    torch.testing.assert_close((found @ axes.T).abs(), torch.eye(2), atol=0.05, rtol=0)  # the constant one first


@pytest.mark.parametrize("operation", ["clamp from its layer", "ablate at its layer", "ablate everywhere"])
@pytest.mark.parametrize("model", ["chatty", "chatty_mdlm"])
def test_a_learnt_subspace_lowers_its_loss(model, operation, request):
    lm = request.getfixturevalue(model)
    candidates = mean_difference(lm, HARMFUL, HARMLESS)
    start = random_directions(2, lm.d_model, 1.0, 0)
    inputs = dict(layer=2, position=-1, operation=operation, start=start, harmful=HARMFUL, harmless=HARMLESS)
    found = learnt_subspace(lm, candidates, **inputs, steps=12, rate=0.05, price=0.5)
    torch.testing.assert_close(found["basis"] @ found["basis"].T, torch.eye(2), atol=1e-5, rtol=0)

    def losses(vectors):
        steer = [operate(candidates.direction(2, -1, vectors), operation)]
        refusal = torch.nn.functional.softplus(refusal_log_odds(lm, first_slots(lm, HARMFUL, steer))).mean()
        return refusal.item(), divergence(first_slots(lm, HARMLESS), first_slots(lm, HARMLESS, steer)).mean().item()

    assert (found["refusal"][0].item(), found["divergence"][0].item()) == pytest.approx(losses(start), rel=1e-3, abs=1e-4)
    before, after = (r + 0.5 * d for r, d in (losses(start), losses(found["basis"])))
    assert after < before
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


# --- defence ------------------------------------------------------------------------------------------------------------------


def test_the_threshold_has_the_best_balanced_accuracy():
    assert threshold([3.0, 4.0, 5.0], [0.0, 1.0]) == 2.0
    assert threshold([3.0, 4.0, -9.0], [0.0, 1.0, 2.0]) == 2.5  # one error, wherever it lies
    with pytest.raises(ValueError, match="equal"):
        threshold([1.0, 1.0], [1.0])


def test_the_monitor_reads_the_request_as_it_is_put(chatty_mdlm):
    direction = mean_difference(chatty_mdlm, HARMFUL, HARMLESS).direction(2, -1)
    rows = pd.DataFrame(watch(chatty_mdlm, direction, PROMPTS, {"en": Asking(after=" now", given=("ok",))}))
    expected = [*readings(chatty_mdlm, direction, [f"{text} now" for text in HARMFUL + HARMLESS])]
    assert rows.reading.tolist() == pytest.approx(expected, abs=1e-4)
    assert rows.side.tolist() == ["harmful"] * 4 + ["harmless"] * 4 and rows.prompt.tolist() == [0, 1, 2, 3] * 2


def test_separation_stands_beside_word_counts(chatty_mdlm):
    direction = mean_difference(chatty_mdlm, HARMFUL, HARMLESS).direction(2, -1)
    watched = pd.DataFrame(watch(chatty_mdlm, direction, PROMPTS))
    found = separation(watched, TRAIN, PROMPTS).set_index("monitor")
    assert found.auroc["projection"] == roc_auc_score(watched.side == "harmful", watched.reading)
    assert found.auroc["word counts"] == 1  # they were fitted on these
    assert (found.n == 8).all()


def test_a_gate_takes_each_row_from_where_the_monitor_sends_it():
    sides = dict(language="en", side="harmful")
    rows = pd.DataFrame(
        [dict(**sides, prompt=i, condition=c, refused=c == "on") for c in ("off", "on", "else") for i in range(3)]
    )
    fires = pd.DataFrame([dict(**sides, prompt=i, fires=i == 1) for i in range(3)])
    found = gated(rows, "on", "off", fires, "gate").sort_values("prompt")
    assert found.refused.tolist() == [False, True, False] and set(found.condition) == {"gate"}
    assert found.columns.tolist() == rows.columns.tolist()
    with pytest.raises(ValueError, match="has not read 2 of 6"):
        gated(rows, "on", "off", fires[:2], "gate")
