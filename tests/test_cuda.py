"""What only a GPU can show: token equality there, no wait for the device inside a fast step, bf16. Skipped elsewhere."""

from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN
from test_core import direction_for, prompts
from test_golden import TOKEN_CASES, decoding, tensors

from lib.hooking import Site, capture
from lib.models import load
from lib.sampling import sample
from lib.steering import StepState, ablate, steering

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GREEDY = [case for case in TOKEN_CASES if not (case.values[1]["settings"].get("temperature") or case.values[1]["seed"])]


@pytest.fixture(scope="module", params=["llada", "dream"])
def lm(request):
    return load(GOLDEN / request.param, device="cuda", dtype=torch.float32)


@pytest.mark.parametrize(("family", "case"), GREEDY)
def test_greedy_tokens_are_those_of_the_cpu(family, case):
    lm, expected = load(GOLDEN / family, device="cuda", dtype=torch.float32), tensors(family, case["name"])
    if family == "llada":
        lm = replace(lm, eot_id=505)
    mask = expected.get("attention_mask")
    out = sample(
        lm,
        expected["prompt"].cuda(),
        None if mask is None else mask.cuda(),
        seed=0,
        decoding=decoding(family, case["settings"]),
    )
    assert torch.equal(out.ids.cpu(), expected["output"])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_fast_step_does_not_wait_for_the_device(lm, temperature):
    """Synchronisation is an error from the second forward pass to the last but one (Dream's grid leaves a step of 8 empty)."""
    passes = []

    def forbid(module, args):
        passes.append(1)
        torch.cuda.set_sync_debug_mode("error" if 1 < len(passes) < 7 else "default")

    handle = lm.model.model.register_forward_pre_hook(forbid)
    steer = [ablate(direction_for(lm))]
    try:
        out = sample(
            lm,
            prompts().cuda(),
            interventions=steer,
            gen_length=8,
            steps=8,
            block_length=8,
            exact=False,
            temperature=temperature,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
        handle.remove()
    assert len(passes) == out.n_forward >= 7


def test_ablation_in_bf16_leaves_less_than_a_percent():
    for family in ("llada", "dream"):
        lm = load(GOLDEN / family, device="cuda", dtype=torch.bfloat16)
        d, ids = direction_for(lm), prompts().cuda()
        before = capture(lm, ids, [Site(1)])[Site(1)].float() @ d.basis[0].cuda()
        with steering(lm, [ablate(d)]) as at:
            at(StepState(torch.ones_like(ids), ids < 0))
            after = capture(lm, ids, [Site(1)])[Site(1)].float() @ d.basis[0].cuda()
        assert after.norm() < 0.01 * before.norm()
