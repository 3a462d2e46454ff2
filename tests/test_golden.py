"""The published code's own numbers on tiny weights (tests/golden): logits and residuals, and every sampler case token for token."""

import json

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from lib.hooking import Site, capture
from lib.models import load
from lib.sampling import Decoding, sample


def cases(family):
    return json.loads((GOLDEN / "cases" / f"{family}.json").read_text())["cases"]


def tensors(family, case):
    everything = load_file(GOLDEN / "cases" / f"{family}.safetensors")
    return {key.split("/", 1)[1]: value for key, value in everything.items() if key.startswith(f"{case}/")}


# A mask token inside the prompt competes with the response in LLaDA's code; here a prompt is never changed.
TOKEN_CASES = [
    pytest.param(family, case, id=f"{family}-{case['name']}")
    for family in ("llada", "dream")
    for case in cases(family)
    if "output" in case["tensors"] and case["name"] != "quirk_masks_inside_prompt"
]


def decoding(family, settings):
    if family == "llada":
        return Decoding(**{key: value for key, value in settings.items() if key not in ("mask_id", "attention_mask")})
    length = settings["max_new_tokens"]
    shared = {key: settings[key] for key in ("steps", "temperature", "top_p", "top_k", "alg_temp")}
    return Decoding(gen_length=length, block_length=length, remasking=settings["alg"], **shared)


@pytest.mark.parametrize(("family", "case"), TOKEN_CASES)
def test_sampler_is_token_equal(request, family, case):
    lm, expected = request.getfixturevalue(family), tensors(family, case["name"])
    out = sample(
        lm, expected["prompt"], expected.get("attention_mask"), seed=case["seed"] or 0,
        decoding=decoding(family, case["settings"]), trace=True,
    )  # fmt: skip
    assert torch.equal(out.ids, expected["output"])
    committed = torch.where(out.trace.committed.any(0), out.trace.committed.int().argmax(0), -2)
    assert torch.equal(committed.int(), expected["commit_step"][:, out.prompt_length :])
    assert out.n_forward == case["nfe"]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_forward_and_residuals(request, family):
    lm, expected = request.getfixturevalue(family), tensors(family, "forward")
    ids = expected["input_ids"]
    torch.testing.assert_close(lm.head(lm.trunk(ids)), expected["logits"], atol=2e-4, rtol=0)
    mlp = "block_ff_out" if family == "llada" else "mlp_out"
    names = {"resid_post": "resid", "attn_out": "attn_out", "mlp_out": mlp}
    states = capture(lm, ids, [Site(layer, name) for layer in range(lm.n_layers) for name in names])
    for site, state in states.items():
        torch.testing.assert_close(state, expected[f"{names[site.name]}_{site.layer}"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_left_padding(request, family):
    lm, expected = request.getfixturevalue(family), tensors(family, "forward_leftpad")
    mask = expected["attention_mask"]
    logits = lm.head(lm.trunk(expected["input_ids"], mask))
    torch.testing.assert_close(logits[mask == 1], expected["logits"][mask == 1], atol=2e-4, rtol=0)


def test_bf16_rotates_in_float32():
    expected = tensors("llada", "forward_bf16")
    lm = load(GOLDEN / "llada", device="cpu", dtype=torch.bfloat16)
    logits = lm.head(lm.trunk(expected["input_ids"]))
    assert logits.dtype == torch.bfloat16
    difference = (logits.float() - expected["logits"].float()).abs()
    assert difference.max() <= 1.0 and difference.mean() <= 0.1
