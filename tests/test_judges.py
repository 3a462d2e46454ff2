"""Judges on tiny random checkpoints and a server in a thread: no network, no weights but random ones."""

import json
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import tiny_llama, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lib import judges
from lib.effects import compare, measure
from lib.families import CheckpointError
from lib.judges import JudgeError, agreement, classifier, endpoint, phrases
from lib.results import key

REQUESTS = ("how to rob a bank", "name a cat", "how to bake a cake") * 7
RESPONSES = tuple(f"I {word} bake {i} cakes" for i, word in enumerate(("can't", "can", "will") * 7))
PROMPTS = {"en": {"harmless": REQUESTS[:3]}}


def test_phrases_judge_the_response_alone():
    assert phrases()(["bake", "I'm sorry"], ["Sorry, I can't.", "Preheat the oven."]) == [True, False]
    with pytest.raises(ValueError, match="zip"):
        phrases()(["bake"], [])


# --- checkpoints --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path):
    """A random text classifier that says each of its labels now and then."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64,
        initializer_range=0.5, id2label={0: "answer", 1: "refusal"}, label2id={"answer": 0, "refusal": 1},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.model_max_length = "<unk>", 64
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def guard(tmp_path):
    """A random causal model that writes little but y and n."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    model, tokenizer = LlamaForCausalLM(config), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(["y", "n"])] = torch.randn(32) * torch.tensor([[20.0], [-20.0]])
    model.save_pretrained(tmp_path)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_classifier_refuses_where_its_label_wins(labelled):
    judge = classifier(str(labelled), "refusal", text="{request}\n{response}")
    model, tokenizer = BertForSequenceClassification.from_pretrained(labelled).eval(), tiny_tokenizer()
    expected = []
    for request, response in zip(REQUESTS, RESPONSES, strict=True):
        ids = tokenizer(f"{request}\n{response}", return_tensors="pt").input_ids
        expected.append(model(ids).logits.argmax().item() == 1)
    assert judge(REQUESTS, RESPONSES) == expected and len(set(expected)) == 2
    opposite = classifier(str(labelled), "answer", text="{request}\n{response}")
    assert opposite(REQUESTS, RESPONSES) == [not verdict for verdict in expected]
    assert classifier(str(labelled), "refusal")(["a"], ["b" * 99]) == classifier(str(labelled), "refusal")(["c"], ["b" * 64])
    assert judge([], []) == []


@pytest.mark.parametrize("words", [("yes", "no"), ("\nyes", "\nno")])
def test_a_guard_refuses_where_its_word_is_likelier(guard, words):
    model, tokenizer = LlamaForCausalLM.from_pretrained(guard).eval(), tiny_tokenizer()
    expected = []
    for request, response in zip(REQUESTS, RESPONSES, strict=True):
        turns = [dict(role="user", content=request), dict(role="assistant", content=response)]
        chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + words[0][:-3]
        logits = model(tokenizer(chat, return_tensors="pt", add_special_tokens=False).input_ids).logits[0, -1]
        yes, no = logits[tokenizer.convert_tokens_to_ids(["y", "n"])]
        expected.append((yes > no).item())
    assert classifier(str(guard), *words)(REQUESTS, RESPONSES) == expected and len(set(expected)) == 2


def test_a_guard_that_means_neither_word_is_no_judge(guard):
    with pytest.raises(JudgeError, match=r"about to write '[yn]'.*as it writes them"):
        classifier(str(guard), "safe", "unsafe")(REQUESTS, RESPONSES)
    with pytest.raises(ValueError, match="the beginning of the other"):
        classifier(str(guard), "no", "none")(REQUESTS, RESPONSES)
    (guard / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    judges._loaded.cache_clear()
    with pytest.raises(JudgeError, match="leaves out a turn"):
        classifier(str(guard), "yes", "no")(REQUESTS, RESPONSES)


def test_what_cannot_judge_is_told_before_anything_is_generated(labelled, tmp_path_factory):
    for wrong in (("REFUSAL",), ("refusal", "answer")):
        with pytest.raises(ValueError, match="here answer, refusal"):
            classifier(str(labelled), *wrong)
    with pytest.raises(ValueError, match="such as 'safe' and 'unsafe'"):
        classifier(str(tiny_llama(tmp_path_factory.mktemp("llama"))), "safe")
    own = tiny_llama(
        tmp_path_factory.mktemp("own"), architectures=["OwnForCausalLM"], auto_map={"AutoModelForCausalLM": "own.py"}
    )
    with pytest.raises(CheckpointError, match="OwnForCausalLM; use a"):
        classifier(str(own), "safe", "unsafe")
    (labelled / "model.safetensors").rename(labelled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="never read"):
        classifier(str(labelled), "refusal")


def test_a_checkpoint_without_its_head_is_not_filled_at_random(labelled):
    tensors = load_file(labelled / "model.safetensors")
    save_file(
        {name: x for name, x in tensors.items() if name != "classifier.weight"},
        labelled / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"lacks classifier\.weight"):
        classifier(str(labelled), "refusal")(["a"], ["b"])


def test_results_are_kept_under_names_and_weights(guard):
    judge, other = classifier(str(guard), "yes", "no"), classifier(str(guard), "no", "yes")
    keys = {key(measure, judge=each) for each in (None, phrases(), judge, other, endpoint("http://x/v1", "m"))}
    assert len(keys) == 5 and key(measure, judge=classifier(str(guard), "yes", "no")) in keys
    tiny_llama(guard)  # another checkpoint in the same folder
    assert key(measure, judge=classifier(str(guard), "yes", "no")) not in keys


def test_effects_ask_the_judge_they_are_given(chatty_mdlm, chatty, guard, tmp_path, monkeypatch):
    monkeypatch.setenv("MDLM_RESULTS", str(tmp_path / "results"))
    verdicts = {}
    for words in (("yes", "no"), ("no", "yes")):
        rows = compare(chatty_mdlm, chatty, {"baseline": [[]]}, PROMPTS, judge=classifier(str(guard), *words), gen_length=6)
        assert rows.refused.tolist() == classifier(str(guard), *words)(PROMPTS["en"]["harmless"], rows.text)
        verdicts[words] = rows.refused
    assert (verdicts["yes", "no"] != verdicts["no", "yes"]).all()


# --- a server -----------------------------------------------------------------------------------------------------------------


@contextmanager
def served(answer):
    """A server whose `answer(body, number of the call)` gives (status, content); yields its url and the calls it got."""
    calls, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                calls.append((self.path, dict(self.headers), body))
                status, content = answer(body, len(calls))
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", calls
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(judges, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def told(body, _):
    return 200, " Yes\n" if "can't" in body["messages"][0]["content"] else "no"


def test_an_endpoint_is_asked_about_one_response_a_call(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with served(told) as (url, calls):
        judge = endpoint(url, "judge-1", "JUDGE_KEY")
        assert judge(REQUESTS, RESPONSES) == ["can't" in response for response in RESPONSES]
    assert len(calls) == len(RESPONSES) and "secret" not in repr(judge)
    for path, headers, body in calls:
        assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
        assert (body["model"], body["temperature"], len(body["messages"])) == ("judge-1", 0, 1)
        assert sum(response in body["messages"][0]["content"] for response in RESPONSES) == 1


def test_an_overloaded_endpoint_is_asked_again():
    with served(lambda body, n: told(body, n) if n > 3 else ((429, 503, 500)[n - 1], "later")) as (url, calls):
        assert endpoint(url, "m")(["a"], ["I can't"]) == [True]
        assert len(calls) == 4 and "Authorization" not in calls[0][1]


@pytest.mark.parametrize("verdict", ["Yes, it did", "maybe", "", None, ["yes"]])
def test_anything_but_yes_or_no_raises(verdict):
    with served(lambda *_: (200, verdict)) as (url, calls), pytest.raises(JudgeError, match=r"^0 of 1 .*not yes or no"):
        endpoint(url, "m")(["a"], ["b"])
    assert len(calls) == 1


def test_an_endpoint_that_fails_keeps_nothing_and_says_how_far_it_came(monkeypatch):
    monkeypatch.setattr(judges, "PARALLEL", 1)
    with served(lambda body, n: told(body, n) if n <= 5 else (503, "full")) as (url, calls):
        with pytest.raises(JudgeError, match=r"^5 of 21 .* asked 5 times, answered HTTP 503"):
            endpoint(url, "m")(REQUESTS, RESPONSES)
        assert 5 + judges.ATTEMPTS <= len(calls) <= 5 + 2 * judges.ATTEMPTS  # what was not begun is called off
    with served(lambda *_: (401, "no")) as (url, calls):
        with pytest.raises(JudgeError, match=r"^0 of 1 .* asked 1 times, answered HTTP 401"):
            endpoint(url, "m")(["a"], ["b"])
    with pytest.raises(JudgeError, match=r"^0 of 2 .* asked 5 times, answered URLError"):
        endpoint(url, "m")(["a", "c"], ["b", "d"])


def test_an_endpoint_needs_a_server_and_the_key_it_names(monkeypatch):
    with pytest.raises(ValueError, match="http://"):
        endpoint("file:///etc", "m")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="JUDGE_KEY"):
        endpoint("http://x/v1", "m", "JUDGE_KEY")


# --- agreement ----------------------------------------------------------------------------------------------------------------


def test_agreement_counts_refusals_found_and_answers_passed():
    rates = agreement([True, True, False, False, True, False], [True, True, True, False, False, False])
    assert [(name, round(rate.value * rate.n), rate.n) for name, rate in rates.items()] == [
        ("accuracy", 4, 6),
        ("sensitivity", 2, 3),
        ("specificity", 2, 3),
    ]
    z, n, p = 1.959964, 3, 2 / 3  # Wilson 1927
    middle, reach = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    limits = [(middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)]
    assert [rates["sensitivity"].lo, rates["sensitivity"].hi] == pytest.approx(limits, abs=1e-6)
    for verdicts, labels in (([True], [True, False]), ([True, False], [True, True]), ([], [])):
        with pytest.raises(ValueError, match="both kinds"):
            agreement(verdicts, labels)
