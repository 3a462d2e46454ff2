"""Facts that everything else rests on: hooks, scopes, directions, schedules, loading; on tiny random models."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lib.extraction import Candidates, Direction, DirectionMismatch, orthonormal, principal_components
from lib.families import CheckpointError
from lib.hooking import SITES, Site, capture, enter, intervene, resume
from lib.models import load
from lib.sampling import Decoding, DecodingError, sample, transfer_counts
from lib.steering import Scope, StepState, ablate, add, clamp, steering

FAMILIES = ["llada", "dream", "llama", "llama_mdlm"]
DIFFUSION = ["llada", "dream", "llama_mdlm"]


@pytest.fixture(params=FAMILIES)
def lm(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=DIFFUSION)
def mdlm(request):
    return request.getfixturevalue(request.param)


def prompts(b=2, s=7, seed=0):
    return torch.randint(3, 90, (b, s), generator=torch.Generator().manual_seed(seed))


def direction_for(lm, k=1, layer=1, seed=3):
    vectors = torch.randn(k, lm.d_model, generator=torch.Generator().manual_seed(seed))
    return Direction(
        orthonormal(vectors), torch.full((lm.n_layers,), 2.0), layer, -1, torch.full((lm.n_layers, k), 0.5), lm.fingerprint
    )


def hook_table(lm):
    return {name: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for name, m in lm.model.named_modules()}


# --- hooking ------------------------------------------------------------------------------------------------------------------


def test_sites_add_up(lm):
    states = capture(lm, prompts(), [Site(layer, name) for layer in (0, 1) for name in SITES])
    mid = states[Site(0, "resid_pre")] + states[Site(0, "attn_out")]
    assert torch.equal(states[Site(0, "resid_mid")], mid)
    assert torch.equal(states[Site(0, "resid_post")], mid + states[Site(0, "mlp_out")])
    assert torch.equal(states[Site(0, "resid_post")], states[Site(1, "resid_pre")])


@pytest.mark.parametrize("name", SITES)
def test_an_edit_moves_its_site_and_nothing_before(lm, name):
    ids, site, vector = prompts(), Site(2, name), torch.linspace(-1, 1, lm.d_model)
    plain = capture(lm, ids, [Site(1, "resid_pre"), site])
    with intervene(lm, [(site, lambda h: h + vector)]):
        moved = capture(lm, ids, [Site(1, "resid_pre"), site])
    assert torch.equal(moved[Site(1, "resid_pre")], plain[Site(1, "resid_pre")])
    assert torch.equal(moved[site], plain[site] + vector)


def test_resid_mid_is_carried_by_the_residual_stream(lm):
    ids, vector = prompts(), torch.linspace(-1, 1, lm.d_model)
    results = []
    for name in ("resid_mid", "attn_out"):
        with intervene(lm, [(Site(1, name), lambda h: h + vector)]):
            results.append(lm.logits(ids))
    torch.testing.assert_close(*results, atol=2e-4, rtol=1e-4)


def test_hooks_leave_no_trace(lm):
    before, vector = hook_table(lm), torch.ones(lm.d_model)
    edits = [(Site(1, name), lambda h: h + vector) for name in SITES]
    with pytest.raises(ZeroDivisionError), intervene(lm, edits), intervene(lm, edits):
        capture(lm, prompts(), [Site(1)])
        raise ZeroDivisionError
    assert hook_table(lm) == before


@pytest.mark.parametrize("layer", [0, 2])
def test_a_pass_taken_up_at_a_layer_is_the_whole_pass(lm, layer):
    ids = prompts()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    vector, before = torch.linspace(-1, 1, lm.d_model), hook_table(lm)
    edits = [(Site(2, "resid_pre"), lambda h: h + vector), (Site(2, "mlp_out"), lambda h: h * 2)]
    entry = enter(lm, ids, layer, mask)
    for _ in range(2):
        assert torch.equal(resume(lm, entry), lm.hidden(ids, mask))
        with intervene(lm, edits):
            assert torch.equal(resume(lm, entry), lm.hidden(ids, mask))
    assert hook_table(lm) == before


def test_a_layer_that_is_not_there(lm):
    with pytest.raises(ValueError, match="has layers 0 to"), intervene(lm, [(Site(99), lambda h: h)]):
        pass


# --- steering -----------------------------------------------------------------------------------------------------------------


def test_zero_strength_and_empty_windows_are_bitwise_the_baseline(lm):
    ids, d = prompts(), direction_for(lm)
    changes = dict(gen_length=8)
    plain = sample(lm, ids, **changes).ids
    for steer in (add(d, 0.0), add(d, 9.0, scope=Scope(steps=slice(0, 0))), ablate(d, scope=Scope(blocks=slice(9, None)))):
        assert torch.equal(sample(lm, ids, interventions=[steer], **changes).ids, plain)
    assert not torch.equal(sample(lm, ids, interventions=[add(d, 50.0)], **changes).ids, plain)


def test_ablation_clears_and_clamp_sets_the_projection(lm):
    d, sites = (
        direction_for(lm, k=2),
        [Site(layer, name) for layer in range(lm.n_layers) for name in ("resid_pre", "attn_out", "mlp_out")],
    )
    ids = prompts()
    state = StepState(torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool))
    with steering(lm, [ablate(d)]) as at:
        at(state)
        for h in capture(lm, ids, sites).values():
            assert ((h @ d.basis.T).abs() <= 1e-5 * h.norm(dim=-1, keepdim=True).clamp(min=1)).all()
    with steering(lm, [clamp(d)]) as at:
        at(state)
        for h in capture(lm, ids, [Site(layer) for layer in range(lm.n_layers)]).values():
            torch.testing.assert_close(h @ d.basis.T, torch.full((*ids.shape, 2), 0.5), atol=1e-4, rtol=0)


def test_outside_the_scope_nothing_changes(lm):
    ids, d = prompts(), direction_for(lm)
    codes = torch.tensor([[1, 2, 2, 3, 4, 4, 4], [0, 1, 2, 3, 4, 4, 4]])
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked[:, -1] = True
    plain = capture(lm, ids, [Site(1)])[Site(1)]
    for tokens, where in [
        ("response", codes == 4),
        ("pre_instruction", codes == 1),
        ("masked", masked),
        ("prompt", (codes > 0) & (codes < 4)),
    ]:
        with steering(lm, [add(d, 1.5, scope=Scope(tokens))]) as at:
            at(StepState(codes, masked))
            moved = capture(lm, ids, [Site(1)])[Site(1)]
        assert torch.equal(moved[~where], plain[~where])
        torch.testing.assert_close(moved[where], plain[where] + 3.0 * d.basis[0])


def test_guidance_steers_both_halves(llada):
    out = sample(
        llada, prompts(), interventions=[add(direction_for(llada), 1.0, scope=Scope("masked"))], gen_length=8, cfg_scale=1.0
    )
    assert (out.response != llada.mask_id).all()


def test_baked_weights_equal_hooks(llama_mdlm, tmp_path):
    llama_mdlm.save(tmp_path)
    hooked, baked = (load(tmp_path, device="cpu", dtype=torch.float64) for _ in range(2))
    d = direction_for(hooked)
    q = d.basis.double()[0]
    q = q / q.norm()
    d = replace(d, basis=d.basis)
    trunk = baked.model.model
    outward = torch.outer(q, q)
    baked_head = baked.model.lm_head.weight.clone()
    trunk.embed_tokens.weight = torch.nn.Parameter(trunk.embed_tokens.weight - trunk.embed_tokens.weight @ outward, False)
    baked.model.lm_head.weight = torch.nn.Parameter(baked_head, False)  # the tied head reads the stream, it does not write it
    for block in trunk.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.weight -= outward @ linear.weight
    ids = prompts()
    with steering(hooked, [ablate(d)]) as at:
        at(StepState(torch.ones_like(ids), ids < 0))
        expected = hooked.logits(ids)
    torch.testing.assert_close(baked.logits(ids), expected, atol=1e-5, rtol=1e-5)  # the basis itself is float32


def test_a_direction_knows_its_model(llama, llama_mdlm, tmp_path):
    d = replace(direction_for(llama), provenance=dict(model="tiny", prompts="abc"))
    d.save(tmp_path / "d.safetensors")
    again = Direction.load(tmp_path / "d.safetensors")
    for name in ("basis", "scale", "reference"):
        assert torch.equal(getattr(again, name), getattr(d, name))
    for name in ("layer", "position", "fingerprint", "provenance"):
        assert getattr(again, name) == getattr(d, name)
    with pytest.raises(DirectionMismatch, match="unbound"):
        sample(llama_mdlm, prompts(), interventions=[ablate(again)], gen_length=2)
    sample(llama_mdlm, prompts(), interventions=[ablate(again.unbound())], gen_length=2)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a direction"):
        Direction.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="single direction"):
        add(direction_for(llama, k=2))


def test_scopes_and_sites_are_checked():
    with pytest.raises(ValueError, match="use one of"):
        Scope("everything")
    with pytest.raises(ValueError, match="slice"):
        Scope(steps=3)
    with pytest.raises(ValueError, match="use one of"):
        Site(0, "resid")


# --- extraction ---------------------------------------------------------------------------------------------------------------


def test_a_planted_direction_is_found():
    generator = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    noise = torch.randn(200, 64, generator=generator)
    labels = torch.arange(200) < 100
    x = noise + 8 * labels[:, None] * planted
    means = [x[mask].mean(0)[None, None].double() for mask in (labels, ~labels)]
    d = Candidates(*means, positions=(-1,), fingerprint="f", provenance={}).direction(0, -1)
    assert abs(d.basis[0] @ planted) > 0.97
    assert abs(principal_components(x)[0][0] @ planted) > 0.97
    assert abs(torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0) @ planted) < 0.5
    with pytest.raises(ValueError, match="no candidate"):
        Candidates(*means, positions=(-1,), fingerprint="f", provenance={}).direction(0, 3)
    with pytest.raises(ValueError, match="equal"):
        Candidates(means[0], means[0], positions=(-1,), fingerprint="f", provenance={}).direction(0, -1)


# --- sampling -----------------------------------------------------------------------------------------------------------------


def test_batched_equals_one_by_one(lm):
    rows = [prompts(1, s, seed=s) for s in (4, 6, 9)]
    ids = torch.full((3, 9), lm.pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, 9 - row.shape[1] :], mask[i, 9 - row.shape[1] :] = row[0], 1
    for changes in (dict(gen_length=8), dict(gen_length=8, temperature=1.0, exact=False)):
        seeds = [5, 6, 7]
        together = sample(lm, ids, mask, seed=0 if changes.get("exact", True) else seeds, **changes).response
        for i, row in enumerate(rows):
            alone = sample(lm, row, seed=0 if changes.get("exact", True) else [seeds[i]], **changes).response
            assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("operation", [ablate, clamp])
def test_strength_is_the_share_of_the_change(lm, operation):
    direction = direction_for(lm)
    site = Site(direction.layer)
    states = []
    for strength in (0.0, 0.25, 1.0):
        one = replace(operation(direction, layers=direction.layer, strength=strength), sites=("resid_pre",))
        with steering(lm, [one]) as at:
            at(StepState(torch.ones_like(prompts()), torch.zeros_like(prompts(), dtype=torch.bool)))
            states.append(capture(lm, prompts(), [site])[site])
    plain = capture(lm, prompts(), [site])[site]
    assert torch.equal(states[0], plain)
    assert torch.allclose(states[1], torch.lerp(plain, states[2], 0.25), atol=1e-5) and not torch.allclose(states[2], plain)


def test_same_seed_same_text(mdlm):
    draw = [sample(mdlm, prompts(), seed=s, gen_length=8, temperature=1.0).ids for s in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


@settings(max_examples=25, deadline=None)
@given(
    n_blocks=st.integers(1, 3),
    block_length=st.integers(1, 5),
    steps=st.integers(1, 6),
    remasking=st.sampled_from(["low_confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy"]),
    exact=st.booleans(),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_the_mask_token_is_never_committed(llama_mdlm, n_blocks, block_length, steps, remasking, exact, temperature):
    if remasking not in ("low_confidence", "random"):
        block_length, n_blocks = block_length * n_blocks, 1
    out = sample(
        llama_mdlm, prompts(), trace=True, gen_length=n_blocks * block_length, block_length=block_length,
        steps=steps * n_blocks, remasking=remasking, exact=exact, temperature=temperature,
    )  # fmt: skip
    assert (out.response != llama_mdlm.mask_id).all()
    assert (out.trace.committed.sum(0) == 1).all()
    assert torch.equal(out.ids[:, :7], prompts())


@settings(max_examples=25, deadline=None)
@given(
    pattern=st.lists(st.booleans(), min_size=1, max_size=8).filter(lambda pattern: len(pattern) < 8 or not all(pattern)),
    remasking=st.sampled_from(["low_confidence", "random", "origin", "maskgit_plus"]),
    exact=st.booleans(),
)
def test_given_tokens_stay_and_gaps_are_filled(llama_mdlm, pattern, remasking, exact):
    tokens = [7 + i if there else None for i, there in enumerate(pattern)]
    block_length = 4 if remasking in ("low_confidence", "random") else 8
    settings = dict(gen_length=8, block_length=block_length, steps=8, remasking=remasking, exact=exact)
    out = sample(llama_mdlm, prompts(), trace=True, given=tokens, **settings)
    for slot in range(8):
        fixed = slot < len(tokens) and tokens[slot] is not None
        assert (out.response[:, slot] == tokens[slot]).all() if fixed else (out.response[:, slot] != llama_mdlm.mask_id).all()
        assert (out.trace.committed[:, :, slot].sum(0) == (0 if fixed else 1)).all()


def test_a_given_beginning_is_as_good_as_read(llama):
    beginning = [9, 11, 3]
    longer = torch.cat([prompts(), torch.tensor([beginning] * len(prompts()))], 1)
    out = sample(llama, prompts(), given=beginning, gen_length=8)
    assert torch.equal(out.ids, sample(llama, longer, gen_length=5).ids)
    with pytest.raises(DecodingError, match="without gaps"):
        sample(llama, prompts(), given=[9, None, 3])
    with pytest.raises(DecodingError, match="leave nothing to write"):
        sample(llama, prompts(), given=[9] * 8, gen_length=8)


@given(st.integers(0, 200), st.integers(1, 50))
def test_transfer_counts_sum_and_fall(n_masked, steps):
    counts = transfer_counts(n_masked, steps)
    assert sum(counts) == n_masked and len(counts) == steps and sorted(counts, reverse=True) == counts


def test_autoregression_equals_transformers(llama):
    ids = prompts(1)
    expected = llama.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=2)
    out = sample(llama, ids, gen_length=8).ids[:, : expected.shape[1]]
    assert torch.equal(out, expected)


def test_settings_that_do_not_fit(llama, llada):
    with pytest.raises(DecodingError, match="autoregressive and has no mask token"):
        sample(llama, prompts(), remasking="low_confidence")
    with pytest.raises(DecodingError, match="masked diffusion model"):
        sample(llada, prompts(), remasking="autoregressive")
    for wrong in (
        dict(gen_length=10, block_length=4),
        dict(remasking="best"),
        dict(temperature=-1.0),
        dict(top_p=0.9),
        dict(steps=0),
    ):
        with pytest.raises(DecodingError):
            Decoding(**wrong)
    with pytest.raises(TypeError, match="unknown decoding fields"):
        Decoding.of(llada, gen_lenght=3)
    assert Decoding.of(llada, gen_length=64) == Decoding(gen_length=64, steps=64, block_length=32)


# --- models -------------------------------------------------------------------------------------------------------------------


def test_logits_score_their_own_position(dream, llada):
    ids = prompts()
    raw = dream.head(dream.trunk(ids))
    assert torch.equal(dream.logits(ids)[:, 1:], raw[:, :-1]) and torch.equal(dream.logits(ids)[:, 0], raw[:, 0])
    assert torch.equal(llada.logits(ids), llada.head(llada.trunk(ids)))


def test_only_the_causal_model_cannot_see_ahead(lm):
    ids = prompts()
    later = ids.clone()
    later[:, -1] = 3
    assert torch.allclose(lm.trunk(ids)[:, :-1], lm.trunk(later)[:, :-1], atol=1e-6) == lm.causal


def test_saved_and_loaded_bit_for_bit(llama_mdlm, tmp_path):
    llama_mdlm.save(tmp_path)
    again = load(tmp_path, device="cpu")
    assert again.family.name == "llama-mdlm" and again.mask_id == 95
    assert torch.equal(again.logits(prompts()), llama_mdlm.logits(prompts()))


def broken(tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(GOLDEN / "llada", folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


WTE = "model.transformer.wte.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.transformer.blocks.1.q_proj.weight"), "1 missing: model.layers.1.self_attn.q_proj.weight"),
        (lambda w: w.update(surplus=torch.zeros(2)), "1 unexpected: surplus"),
        (lambda w: w.update({WTE: w[WTE][:, :8].contiguous()}), "of another shape"),
        (lambda w: w.update({WTE: w[WTE] / 0}), "not finite"),
    ],
)
def test_damaged_checkpoints_are_named(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        load(broken(tmp_path, change), device="cpu")


def test_shards_and_a_shard_that_is_gone(llada, tmp_path):
    folder = broken(tmp_path, lambda w: None)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(weights)
    parts = {"a.safetensors": keys[:10], "b.safetensors": keys[10:]}
    for name, part in parts.items():
        save_file({key: weights[key] for key in part}, folder / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load(folder, device="cpu").logits(prompts()), llada.logits(prompts()))
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shards b\.safetensors"):
        load(folder, device="cpu")


def test_a_tied_llada(tmp_path):
    folder = broken(tmp_path, lambda w: w.pop("model.transformer.ff_out.weight"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"weight_tying": True}))
    tied = load(folder, device="cpu")
    assert tied.model.lm_head.weight is tied.model.model.embed_tokens.weight


def test_unknown_names_get_the_nearest():
    with pytest.raises(CheckpointError, match="Did you mean smol-mdlm"):
        load("smol-mdml", device="cpu")
