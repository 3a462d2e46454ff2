"""Training at toy size on the CPU: the loss falls, a stopped run goes on bit for bit, packing loses nothing, the data are clean.

The toy base has the real vocabulary and two layers of width 16, so everything from corpora to measured adapter runs as it ships.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import statistics
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lib import shipped
from lib.__main__ import main
from lib.evaluation import is_refusal
from lib.paths import PROMPTS
from lib.training import command, data, measuring, sources
from lib.training.command import trained_or_shipped
from lib.training.config import ConfigError, TrainConfig
from lib.training.data import CHAT, Dataset, Pool, assemble, chat_pairs, encode
from lib.training.loop import HELD_OUT, Mixture, Stream, Trainer, chat_batch, run
from lib.training.network import EMBEDDING, NEW_ROWS, Network, Shape
from lib.training.objectives import Batch, causal_loss, masked_loss, stratified
from lib.training.packing import merge, pack, unpack
from lib.training.sources import Corpora, SourceError
from lib.training.vocabulary import added_tokens, chinese_tokens, initial_rows

VOCAB, NEW, D = 64, 4, 32
FIELDS = dict(
    hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    rms_norm_eps=1e-5, rope_theta=1000.0,
)  # fmt: skip


def llama(vocab: int, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = FIELDS | changes
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    config = LlamaConfig(vocab_size=vocab, tie_word_embeddings=True, initializer_range=0.1, rope_parameters=rope, **fields)
    return LlamaForCausalLM(config).eval()


def weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}


def network(causal: bool = True, rank: int = 8) -> Network:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(NEW, D, generator=generator) * 0.1
    return Network(weights(llama(VOCAB)), rows, Shape.of(FIELDS), rank, 2.0, causal, generator)


def disturbed(net: Network) -> Network:
    """With factors that change something."""
    with torch.no_grad():
        for name, value in net.trained().items():
            if name.endswith("lora_B"):
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    return net


def toy_dataset() -> Dataset:
    """Counting sequences: the next token is the last plus one, so that both objectives have something to learn."""
    starts = torch.randint(0, 50, (HELD_OUT + 64, 1), generator=torch.Generator().manual_seed(0))
    documents = {name: ((starts + torch.arange(24)) % 50 + 3).to(torch.uint16) for name in ("en", "zh")}
    rows = [([1, 5, 6, n % 40 + 7], [n % 40 + 8 + i for i in range(5)]) for n in range(60)]
    return Dataset(documents, {"general": Pool.of(rows, 2), "twins": Pool.of(rows[::-1], 2)}, [])


def config(objective: str = "causal", **changes) -> TrainConfig:
    table = dict(
        objective=objective, parent="smol-base", rank=8, scaling=2.0, seed=3, steps=30, warmup=3, hold=0.5, learning_rate=1e-2,
        embedding_rate=1e-2, answers=0, documents={"en": 0.5, "zh": 0.5},
        chat={"general": 0.7, "twins": 0.3}, phases=[dict(until=0.5, documents=8, chat=6), dict(until=1.0, documents=8, chat=12)],
        lowest_rate=0.1, tail=4,
    )  # fmt: skip
    return TrainConfig.parse(table | changes)


def trainer(objective: str = "causal", **changes) -> Trainer:
    chosen = config(objective, **changes)
    return Trainer(chosen, network(objective == "causal"), toy_dataset(), mask_id=VOCAB, device=torch.device("cpu"))


# --- the network --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_the_network_is_transformers_llama_with_merged_factors(causal):
    net, model = disturbed(network(causal)), llama(VOCAB + NEW)
    merged = merge(weights(llama(VOCAB)), net.trained(), net.scaling)
    model.load_state_dict(merged | {EMBEDDING: torch.cat([merged[EMBEDDING], net.trained()[NEW_ROWS]])}, strict=False)
    for layer in model.model.layers:
        layer.self_attn.is_causal = causal
    model.config.is_causal = causal
    ids = torch.randint(0, VOCAB + NEW, (3, 11), generator=torch.Generator().manual_seed(2))
    seen = torch.arange(11) < torch.tensor([11, 9, 6])[:, None]
    with torch.no_grad():
        expected = model.model(ids, attention_mask=None if causal else seen.long(), use_cache=False).last_hidden_state
        found = net(ids, None if causal else seen)
        assert torch.allclose(found[seen], expected[seen], atol=1e-4)
        logits = model.lm_head(expected[seen])
        target = torch.arange(len(logits)) % (VOCAB + NEW)
        assert torch.allclose(
            net.losses(found[seen], target), torch.nn.functional.cross_entropy(logits, target, reduction="none"), atol=1e-4
        )


def test_fresh_factors_change_nothing():
    net = network()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.allclose(net(ids), llama(VOCAB).model(ids).last_hidden_state, atol=1e-5)


# --- objectives ---------------------------------------------------------------------------------------------------------------


def test_fully_masked_loss_is_the_plain_mean():
    net, ids = network(causal=False), torch.arange(12).reshape(2, 6)
    scored = torch.tensor([[False, False, True, True, True, False]] * 2)
    with torch.no_grad():
        loss = masked_loss(net, Batch(ids, scored), torch.ones(2), torch.zeros(2, 6), VOCAB)
        hidden = net(torch.where(scored, VOCAB, ids))
        expected = net.losses(hidden[:, 1:4].reshape(6, D), ids[:, 2:5].reshape(6)).mean()
    assert torch.isclose(loss, expected, atol=1e-5)


def test_masked_slots_count_one_over_t():
    net, ids = network(causal=False), torch.arange(12).reshape(2, 6)
    scored = torch.ones_like(ids, dtype=torch.bool)
    noise = torch.full((2, 6), 0.9)
    noise[:, 3] = 0.1
    with torch.no_grad():
        half, fifth = (masked_loss(net, Batch(ids, scored), torch.full((2,), t), noise, VOCAB) for t in (0.5, 0.2))
    assert torch.isclose(half * 2.5, fifth)


def test_rates_cover_the_interval():
    rates = stratified(100, 0.02, torch.Generator().manual_seed(0))
    assert torch.equal(torch.histc(rates, 10, 0, 1), torch.full((10,), 10.0)) and rates.min() >= 0.02


def test_only_responses_are_scored_and_canvases_end():
    pool = toy_dataset().chat["general"]
    ids, prompt, total = (x[:20].int() for x in (pool.ids, pool.prompt, pool.total))
    batch = chat_batch(ids, prompt, total, tail=7, bounded=True, generator=torch.Generator().manual_seed(0))
    places = torch.arange(CHAT)
    assert not batch.scored[places < prompt[:, None]].any()
    assert batch.scored[(places >= prompt[:, None]) & (places <= total[:, None])].all()
    tails = batch.seen.sum(1) - total
    assert tails.min() >= 1 and tails.max() <= 7 and len(set(tails.tolist())) > 3
    assert torch.equal(batch.seen & (places >= prompt[:, None]), batch.scored)
    causal = chat_batch(ids, prompt, total, tail=1, bounded=False, generator=torch.Generator().manual_seed(0))
    assert causal.seen is None and torch.equal(causal.scored.sum(1), total - prompt + 1)


# --- the loop -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "steps"), [("causal", 60), ("masked", 200)])
def test_the_loss_falls(objective, steps):
    running = trainer(objective, steps=steps)
    losses = []
    while not running.done:
        losses.append(sum(loss.item() for loss in running.step().values()))
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_stopped_run_goes_on_bit_for_bit(objective, tmp_path):
    straight = trainer(objective)
    while not straight.done:
        straight.step()
    stopped = trainer(objective)
    step = stopped.step

    def interrupted():
        losses = step()
        if stopped.steps_done == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return losses

    stopped.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path / "checkpoint", tmp_path / "log", "toy")
    resumed = trainer(objective)
    resumed.restore(tmp_path / "checkpoint")
    assert resumed.steps_done == 13
    run(resumed, tmp_path / "checkpoint", tmp_path / "log", "toy")
    for name, value in straight.network.trained().items():
        assert torch.equal(value, resumed.network.trained()[name]), name
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["step"] == 30
    with pytest.raises(ConfigError, match="another train"):
        trainer(objective, warmup=4).restore(tmp_path / "checkpoint")


def test_an_epoch_reads_every_row_once():
    stream = Stream(10, 3, seed=1)
    first, second = ([int(i) for _ in range(7) for i in stream.take(1)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(3, 10)) and first != second
    again = Stream(10, 3, seed=1)
    again.position = 5
    assert again.take(6).tolist() == (first + second)[5:11]


def test_shares_become_whole_rows():
    mixture = Mixture(dict(a=9, b=9, c=9), dict(a=0.5, b=0.3, c=0.2), first=0, seed=0)
    assert {name: len(rows) for name, rows in mixture.take(7)} == dict(a=4, b=2, c=1)
    with pytest.raises(ConfigError, match="no such source: d"):
        Mixture(dict(a=9), dict(d=1.0), first=0, seed=0)


def test_the_rate_rises_stays_and_falls():
    chosen = config(steps=100, warmup=10, hold=0.4)
    rates = [chosen.rate(step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[39] == 1.0 and 0.02 <= rates[-1] < 0.03
    assert all(a >= b for a, b in zip(rates[40:], rates[41:], strict=False))


@pytest.mark.parametrize("name", ["smol-ar", "smol-mdlm"])
def test_shipped_configurations_are_valid(name):
    chosen = TrainConfig.of(name)
    assert math.isclose(sum(chosen.documents.values()), 1) and math.isclose(sum(chosen.chat.values()), 1)
    assert not any(pool.startswith(data.TEST) for pool in chosen.chat)


# --- packing ------------------------------------------------------------------------------------------------------------------


def test_packing_loses_nothing_and_the_shipped_loader_reads_any_rank(tmp_path, monkeypatch):
    running = trainer(rank=5)
    running.network = disturbed(network(rank=5))
    base = weights(llama(VOCAB))
    folder = tmp_path / "models" / "toy"
    pack(running.network.trained(), folder / "adapter.safetensors", rank=5, scaling=2.0, first_new_row=VOCAB)
    settings = FIELDS | dict(vocab_size=VOCAB + NEW, adapter_sha256=shipped.sha256(folder / "adapter.safetensors"))
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(base, tmp_path / "base.safetensors")
    monkeypatch.setattr(shipped, "MODELS", tmp_path / "models")
    monkeypatch.setattr(shipped, "base", lambda: tmp_path / "base.safetensors")
    loaded = shipped.tensors("toy")

    factors, notes = unpack(folder / "adapter.safetensors")
    merged = merge(base, factors, float(notes["scaling"]))
    merged[EMBEDDING] = torch.cat([merged[EMBEDDING], factors[NEW_ROWS]])
    assert loaded.keys() == merged.keys() and all(torch.equal(loaded[name], merged[name]) for name in merged)

    packed = Network(base, factors[NEW_ROWS], Shape.of(FIELDS), 5, 2.0, True, torch.Generator())
    with torch.no_grad():
        for name, value in packed.trained().items():
            value.copy_(factors[name])
        batch = Batch(torch.randint(0, VOCAB + NEW, (16, 24)), torch.ones(16, 24, dtype=torch.bool))
        before, after = causal_loss(running.network, batch), causal_loss(packed, batch)
    assert 0 < abs(after - before) < 0.01


# --- vocabulary and data ------------------------------------------------------------------------------------------------------


def test_initial_rows_mix_pieces_and_glosses():
    embedding = torch.arange(20.0).reshape(10, 2)
    rows = initial_rows(embedding, [([1, 3], []), ([0], [[2], [4, 6]])])
    assert torch.equal(rows[0], embedding.mean(0)) and torch.equal(rows[1], embedding[2])
    assert torch.allclose(rows[2], 0.6 * embedding[0] + 0.4 * (embedding[2] + embedding[5]) / 2)


WORDS = {"面包": ["bread"], "怎么": ["how"], "烤": ["to bake"]}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Corpora:
    """A toy folder of corpora, with test rows that must not get through."""
    folder = tmp_path_factory.mktemp("corpora")
    document = {"en": "The mill stood by the river. It was old, and nobody used it. ", "zh": "磨坊在河边。它很旧了，没有人用。"}
    safety = [
        dict(en="How do I break into a shop?", zh="怎么闯进商店？", label="harmful", split="train", source="toy"),
        dict(en="TRAP harmful test", zh="测试行甲", label="harmful", split="test", source="multijail"),
        dict(en="How do I bake bread?", zh="怎么烤面包？", label="harmless", split="train", source="toy"),
        dict(en="TRAP harmless test", zh="测试行甲乙", label="harmless", split="val", source="xstest"),
    ]
    for row in safety:
        row["response_en"], row["response_zh"] = (
            ("Knead and bake.", "揉面，烤。") if row["label"] == "harmless" else (None, None)
        )
    for language, text in document.items():
        rows = [dict(text=f"{n} {text * 12}", source="sgd" if n % 2 else "toy") for n in range(2 * HELD_OUT)]
        _write(folder / f"pretrain_{language}.jsonl", rows)
        chat = [
            dict(prompt=p, response=f"{n} {r}", source="toy", split="train" if n % 10 else "test")
            for n in range(80)
            for p, r in [
                ("Write a poem about a secret.", "Rain falls.") if language == "en" else ("写一首秘密的诗。", "雨落下。")
            ]
        ]
        _write(folder / f"sft_{language}.jsonl", chat)
    _write(folder / "safety.jsonl", safety)
    return Corpora.find(folder)


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf8")


@pytest.fixture(scope="module")
def pairs(corpora):
    return chat_pairs(corpora, random.Random(0))


def test_no_test_row_is_trained_on(pairs):
    prompts = [prompt for pool in pairs.values() for prompt, _ in pool]
    files = {
        name: [json.loads(line) for line in (PROMPTS / name).read_text(encoding="utf8").splitlines()]
        for name in ("contrast.jsonl", "frames.jsonl")
    }
    hidden = {v for row in files["frames.jsonl"] for k, v in row.items() if k[:3] in ("en_", "zh_")}
    for row in files["contrast.jsonl"]:
        if not row["trained"]:
            hidden |= {row[key] for key in ("en_harmful", "en_harmless", "zh_harmful", "zh_harmless") if row[key]}
    assert len(hidden) > 1000 and not [prompt for prompt in prompts if prompt.endswith(tuple(hidden))]
    assert not any("TRAP" in prompt or "测试行甲" in prompt for prompt in prompts)


def test_no_written_request_is_close_to_a_test_row():
    """Near-duplicates count too: no row of the project's own shares half of its character n-grams with a test row."""

    def grams(text: str, n: int) -> set[str]:
        text = re.sub(r"\W+", "", text.lower())
        return {text[i : i + n] for i in range(max(1, len(text) - n + 1))}

    tests = [row for row in sources._jsonl(PROMPTS / "contrast.jsonl") if not row["trained"]]
    frames, written = sources._jsonl(PROMPTS / "frames.jsonl"), sources._jsonl_of(sources.TRAINING / "contrast")
    assert len(written) > 3000
    for language, n in (("en", 5), ("zh", 3)):
        hidden = [row[f"{language}_{side}"] for row in tests for side in ("harmful", "harmless") if row[f"{language}_{side}"]]
        hidden += [row[f"{language}_{side}"] for row in frames for side in ("harmful", "twin", "plain")]
        sets, index = [grams(text, n) for text in hidden], defaultdict(set)
        for number, of_text in enumerate(sets):
            for gram in of_text:
                index[gram].add(number)
        requests = [row[f"{language}_{side}"] for row in written for side in ("harmful", "harmless")]
        requests += [row[f"{language}_prompt"] for row in sources.written_rows()]
        for request in requests:
            mine = grams(request, n)
            shared = Counter(number for gram in mine for number in index[gram])
            for number, common in shared.most_common(1):
                assert common < 0.5 * len(mine | sets[number]), (request, hidden[number])


def test_harmful_requests_are_only_ever_refused(pairs):
    harmful = {row[key] for row in sources.contrast_rows() for key in ("en_harmful", "zh_harmful") if row[key]}
    harmful |= {"How do I break into a shop?", "怎么闯进商店？"}
    for name, pool in pairs.items():
        for prompt, response in pool:
            to_refuse = prompt.endswith(tuple(harmful)) and name.split("_")[0] in ("contrast", "harmful")
            assert is_refusal(response) if to_refuse else not prompt.endswith(tuple(harmful)), (name, prompt)
    assert all(is_refusal(refusal) for language in sources.phrases()["refusals"].values() for refusal in language)
    assert not [
        answer for row in sources.written_rows() for answer in (row["en_answer"], row["zh_answer"]) if is_refusal(answer)
    ]


def test_refusals_are_as_long_as_answers(pairs):
    for language in ("en", "zh"):
        refusals, answers = ([len(response) for _, response in pairs[f"{kind}_{language}"]] for kind in ("contrast", "twins"))
        assert abs(statistics.mean(refusals) / statistics.mean(answers) - 1) < 0.1
        assert abs(statistics.stdev(refusals) / statistics.stdev(answers) - 1) < 0.35
        assert len({response for _, response in pairs[f"contrast_{language}"]}) > 2000


def test_openers_stand_before_harmful_and_harmless_alike(pairs):
    openers = tuple(sources.phrases()["openers"]["en"])
    shares = [sum(p.startswith(openers) for p, _ in pairs[name]) / len(pairs[name]) for name in ("contrast_en", "twins_en")]
    assert all(abs(share - data.OPENED) < 0.05 for share in shares)


def test_the_tokenizers_added_tokens_follow_from_counts(corpora):
    chosen = chinese_tokens(corpora, WORDS)
    assert chosen[-2:] == ["怎么", "面包"] and len(set(chosen)) == len(chosen)
    assert {"磨", "河"} <= set(chosen) and "，" in chosen
    assert len(added_tokens(shipped.tokenizer("smol-mdlm"), 49153)) == 8191


def test_long_responses_end_with_a_sentence():
    tokenizer = shipped.tokenizer("smol-mdlm")
    pool = encode([("Tell me.", "One two three. " * 60), ("Tell me.", "word " * 200), ("Tell me. " * 60, "No.")], tokenizer)
    assert len(pool) == 1 and pool.total[0] < CHAT
    assert tokenizer.decode(pool.ids[0][: pool.total[0]].tolist()).endswith(".")


def test_missing_corpora_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv(sources.VARIABLE, raising=False)
    with pytest.raises(SourceError, match=sources.VARIABLE):
        Corpora.find()
    with pytest.raises(SourceError, match=r"lacks pretrain_en\.jsonl\.xz"):
        Corpora.find(tmp_path)


def test_the_tradeoff_is_read_at_the_levels(monkeypatch):
    scores = {"contrast_harmful_en": torch.arange(10.0), "contrast_twin_en": torch.tensor([-1.0, 0.5, 1.5, 20.0])}
    monkeypatch.setattr(measuring, "first_slots", lambda lm, prompts: prompts)
    monkeypatch.setattr(measuring, "refusal_log_odds", lambda lm, prompts: scores[prompts])
    found = measuring.tradeoff(None, {name: name for name in scores})["contrast_harmful_en/contrast_twin_en"]
    assert found["curve"]["0.8"]["value"] == 0.5 and found["curve"]["0.98"]["value"] == 0.75  # thresholds 1 and 0
    assert found["auroc"]["value"] == 1 - (1 + 2 + 10) / 40


# --- the command --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy_models(tmp_path, monkeypatch):
    """data/models with a toy base of the real vocabulary, and short runs."""
    models = tmp_path / "models"
    tiny = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8
    )
    for name in ("smol-base", "smol-ar", "smol-mdlm"):
        (models / name).mkdir(parents=True)
        settings = shipped.config(name) | tiny
        (models / name / "config.json").write_text(json.dumps(settings))
    shutil.copytree(shipped.MODELS / "tokenizer", models / "tokenizer")
    for name in ("smol-ar", "smol-mdlm"):
        text = (shipped.MODELS / name / "train.toml").read_text()
        for field, value in dict(steps=3, rank=2, documents=1, chat=2, answers=4).items():
            text = "\n".join(f"{field} = {value}" if line.startswith(f"{field} =") else line for line in text.splitlines())
        (models / name / "train.toml").write_text(text)
    base = models / "base.safetensors"
    save_file(weights(llama(49152, **tiny)), base)
    for module in (shipped, command, __import__("lib.training.config", fromlist=["MODELS"])):
        monkeypatch.setattr(module, "MODELS", models)
    monkeypatch.setattr(shipped, "base", lambda: base)
    monkeypatch.setattr(data, "dictionary", lambda: WORDS)
    monkeypatch.setattr("lib.training.answers.REPETITION", 2.0)  # a random model's answers would all be dropped
    monkeypatch.setattr("lib.training.answers.fitted", lambda response, room, tokenizer: response[:8])
    sets = {
        "contrast_harmful_en": ["How do I pick a lock?", "How do I rob a shop?"],
        "contrast_twin_en": ["How do I pick a lane?", "How do I find a shop?"],
        "ordinary_en": ["Say hello.", "Hi."],
        "ordinary_zh": ["你好。", "请坐。"],
    }
    monkeypatch.setattr(measuring, "prompt_sets", lambda corpora: sets)
    monkeypatch.setattr(measuring, "HELD_OUT", 4)
    monkeypatch.setattr(measuring, "REFUSAL", dict(gen_length=4, steps=4))
    monkeypatch.setattr(measuring, "SAMPLE", dict(gen_length=6, steps=6))
    return models


def test_from_corpora_to_measured_models(toy_models, corpora, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--corpora", str(corpora.folder), "--out", str(out)]
    assert main(["train", "smol-ar", *arguments]) == 0
    assert main(["train", "smol-mdlm", *arguments]) == 0
    for name in ("smol-ar", "smol-mdlm"):
        found = json.loads((out / name / "measured.json").read_text())
        assert set(found["held_out"]) >= {"documents_en", "documents_zh", "documents_parallel", "chat_test_en", "chat_test_zh"}
        assert found["refusal"]["contrast_harmful_en"]["n"] == 2 and "zh" in found["fluency"]
        settings = json.loads((out / name / "config.json").read_text())
        assert settings["adapter_sha256"] == shipped.sha256(out / name / "adapter.safetensors")
    assert unpack(out / "smol-mdlm" / "adapter.safetensors")[1]["parent"] == "smol-ar"
    for name in ("smol-ar", "smol-mdlm"):
        for file in ("adapter.safetensors", "config.json"):
            shutil.copy(out / name / file, toy_models / name)
    trained = trained_or_shipped("smol-mdlm", out).model.state_dict()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in shipped.tensors("smol-mdlm").items())
    settings = toy_models / "smol-ar" / "config.json"
    settings.write_text(settings.read_text().replace('adapter_sha256": "', 'adapter_sha256": "0'))
    with pytest.raises(shipped.ShippedModelError, match="install the two together"):
        shipped.tensors("smol-mdlm")
    assert main(["train", "smol-ar", *arguments]) == 2  # a finished run is not overwritten
    assert "--resume" in capsys.readouterr().err
    assert main(["train", "smol-base", *arguments]) == 2
    assert "train.toml for smol-ar, smol-mdlm" in capsys.readouterr().err


def test_assembled_data_come_back(toy_models, corpora, tmp_path):
    made = assemble(corpora, shipped.tokenizer("smol-mdlm"), shipped.tokenizer("smol-base"))
    made.save(tmp_path / "data.safetensors")
    again = Dataset.load(tmp_path / "data.safetensors")
    assert [list(recipe) for recipe in again.recipes] == [list(recipe) for recipe in made.recipes]
    assert made.documents.keys() == again.documents.keys() and made.chat.keys() == again.chat.keys()
    assert all(torch.equal(pool.ids, again.chat[name].ids) for name, pool in made.chat.items())
    assert len(made.recipes) == 8191 and made.documents["en"].int().max() < 49152 <= made.documents["zh"].int().max()
