"""Scores on known values, and what an intervention does: on tiny random models and on tables written by hand."""

import gc
import math
import weakref

import pandas as pd
import pytest
import torch
from conftest import HARMFUL, HARMLESS

from lib.effects import BASELINE, compare, controls, measure, summary, tell
from lib.evaluation import (
    SCORED_SLOTS,
    divergence,
    first_slots,
    nats_per_token,
    refusal_log_odds,
    refusal_tokens,
    remembered,
    repetition,
    word_count_scores,
)
from lib.extraction import mean_difference
from lib.prompts import Contrast, encode
from lib.steering import ablate, add

pytestmark = pytest.mark.usefixtures("store")


# --- scores -------------------------------------------------------------------------------------------------------------------


def test_the_slots_are_those_behind_the_prompt(chatty_mdlm, chatty):
    for lm, canvas, slots in ((chatty_mdlm, 16, SCORED_SLOTS), (chatty, 1, 1)):
        together = first_slots(lm, HARMFUL, batch_size=3)
        for row, prompt in zip(together, HARMFUL, strict=True):
            ids, mask = encode(lm, [prompt], canvas)
            logits = lm.logits(ids, mask)[0, ids.shape[1] - canvas :][:slots].clone()
            if lm.mask_id is not None:
                logits[:, lm.mask_id] = -torch.inf
            torch.testing.assert_close(row, logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_blocks_before_an_intervention_are_run_once(chatty_mdlm):
    direction = mean_difference(chatty_mdlm, HARMFUL, HARMLESS).direction(2, -1)
    steer = [ablate(direction, ("resid_pre",), 2)]
    early = [ablate(direction, ("resid_pre",), 2), add(direction, 0.0, layer=0)]  # the same change, but from layer 0 on
    runs = []
    hook = chatty_mdlm.model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    late = [first_slots(chatty_mdlm, HARMFUL, steer) for _ in range(3)]
    hook.remove()
    assert len(runs) == 1 and torch.equal(late[0], late[2])
    assert torch.equal(late[0], first_slots(chatty_mdlm, HARMFUL, early))


def test_remembered_results_go_with_their_model():
    class Model:
        pass

    calls = []
    square = remembered(2)(lambda model, x: calls.append(x) or x * x)
    model = Model()
    assert [square(model, x) for x in (2, 2, 3, 2, 4, 3)] == [4, 4, 9, 4, 16, 9] and calls == [2, 3, 4, 3]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_divergence_is_the_mean_kl_of_the_slots():
    p, q = torch.rand(3, 4, 9).softmax(-1), torch.rand(3, 4, 9).softmax(-1)
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(p), torch.distributions.Categorical(q)).mean(
        -1
    )
    torch.testing.assert_close(divergence(p.log(), q.log()), expected)
    assert torch.equal(divergence(p.log(), p.log()), torch.zeros(3))
    banned = [torch.cat([x.log(), torch.full((3, 4, 1), -torch.inf)], dim=-1) for x in (p, q)]
    torch.testing.assert_close(divergence(*banned), expected)


def test_log_odds_take_the_slot_where_refusal_is_likeliest(chatty_mdlm):
    marker = refusal_tokens(chatty_mdlm)[0]
    p = torch.full((2, 3, 96), 1e-9)
    p[:, :, 90] = 1
    p[0, 1, marker], p[0, 1, 90] = 0.8, 0.2
    odds = refusal_log_odds(chatty_mdlm, p.log())
    assert odds[0] == pytest.approx(math.log(0.8 / 0.2), abs=1e-3) and odds[1] < -10


def test_nats_are_those_of_transformers_one_by_one(chatty, chatty_mdlm):
    answers = ("fine", "", "a long answer, with a comma.", "no")
    scores = nats_per_token(chatty, HARMLESS, answers, batch_size=2)
    assert math.isnan(scores[1])
    for prompt, answer, score in zip(HARMLESS, answers, scores, strict=True):
        if answer:
            prompt_ids, _ = encode(chatty, [prompt])
            ids = torch.cat([prompt_ids, chatty.tokenizer(answer, return_tensors="pt").input_ids], dim=1)
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < prompt_ids.shape[1], -100)
            assert score == pytest.approx(chatty.model(ids, labels=labels).loss.item(), abs=1e-4)
    with pytest.raises(ValueError, match="use a causal model"):
        nats_per_token(chatty_mdlm, HARMLESS, answers)


def test_repetition_counts_bigrams_seen_before(chatty):
    assert repetition(chatty, "abcd") == repetition(chatty, "a") == 0
    assert repetition(chatty, "ababa") == 0.5  # ab ba ab ba


@pytest.mark.parametrize(("language", "bad", "good"), [("en", "please kill {}", "please feed {}"), ("zh", "杀死{}", "喂养{}")])
def test_word_counts_find_a_word_that_gives_the_class_away(language, bad, good):
    animals = ["cats", "dogs", "birds", "fish", "mice", "bees"]
    sets = [
        Contrast(language, "train", *(tuple(form.format(a) for a in part) for form in (bad, good)))
        for part in (animals[:4], animals[4:])
    ]
    harmful, harmless = word_count_scores(*sets)
    assert min(harmful) > max(harmless)


# --- effects ------------------------------------------------------------------------------------------------------------------


def test_prompts_are_dealt_among_draws_and_harmful_texts_are_not_kept(chatty_mdlm, chatty):
    candidates = mean_difference(chatty_mdlm, HARMFUL, HARMLESS)
    like = candidates.direction(2, -1)
    draws = [[add(random, 3.0)] for random in controls(candidates, like, 2, seed=0)]
    prompts = {"en": {"harmful": HARMFUL, "harmless": HARMLESS}}
    rows = {side: measure("en", side, chatty_mdlm, chatty, draws, prompts, gen_length=6) for side in ("harmful", "harmless")}
    for side, measured in rows.items():
        assert [row["prompt"] for row in measured] == [0, 1, 2, 3] and [row["draw"] for row in measured] == [0, 1, 0, 1]
        for row in measured:
            [alone] = measure(
                "en",
                side,
                chatty_mdlm,
                chatty,
                [draws[row["draw"]]],
                {"en": {side: prompts["en"][side][row["prompt"] :][:1]}},
                gen_length=6,
            )
            assert row["log_odds"] == pytest.approx(alone["log_odds"], abs=1e-3)
            assert row["divergence"] == pytest.approx(alone["divergence"], abs=1e-3) and row["divergence"] > 0
            assert (row["text"] is None) == (side == "harmful")


def test_controls_are_as_long_as_what_they_control(chatty_mdlm):
    candidates = mean_difference(chatty_mdlm, HARMFUL, HARMLESS)
    like = candidates.direction(2, -1)
    randoms = controls(candidates, like, 3, seed=1)
    assert all(torch.equal(random.scale, like.scale) for random in randoms)
    assert max(abs(float(random.basis[0] @ like.basis[0])) for random in randoms) < 0.9
    assert torch.equal(controls(candidates, like, 3, seed=1)[2].basis, randoms[2].basis)


def test_a_baseline_is_its_own_measure(chatty_mdlm, chatty):
    steer = ablate(mean_difference(chatty_mdlm, HARMFUL, HARMLESS).direction(2, -1))
    prompts = {"en": {"harmless": HARMLESS}}
    table = summary(compare(chatty_mdlm, chatty, {BASELINE: [[]], "removed": [[steer]]}, prompts, gen_length=6)).set_index(
        "condition"
    )
    assert table.divergence[BASELINE] == 0 < table.divergence["removed"]
    assert (table.n == 4).all() and (table.draws == 1).all()
    assert len(tell(table.reset_index()).splitlines()) == 2


def test_fluency_is_compared_on_prompts_that_both_answer():
    facts = dict(language="en", side="harmless", draw=0, repetition=0.0, divergence=0.1)
    base = [dict(facts, condition=BASELINE, prompt=i, refused=i < 2, nats=2.0, empty=False) for i in range(8)]
    steered = [
        dict(facts, condition="steered", prompt=i, refused=i == 7, nats=3.0 if i > 1 else 90.0, empty=i == 5) for i in range(8)
    ]
    table = summary(pd.DataFrame(base + steered)).set_index("condition").loc["steered"]
    assert table.n_answered == 5 and table.nats_ratio == table.nats_ratio_lo == table.nats_ratio_hi == 1.5
    assert table.refused == 1 / 8 and table["empty"] == 1 / 8
    assert table.refused_lo < 1 / 8 < table.refused_hi
