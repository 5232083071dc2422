"""llama-server's own endpoints: what its clients and tests rely on."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest

from tests.serve.conftest import CONTEXT, Live

PROMPT = "It was a dark and"


def completion(live: Live, **fields: Any) -> Any:
    response = live.post("/completion", {"prompt": PROMPT, "n_predict": 8, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def refused(response: Any, status: int, kind: str, *words: str) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (status, status, kind)
    for word in words:
        assert word in error["message"]
    return error


def test_health_models_props_slots(live: Live) -> None:
    assert live.get("/health").json() == live.get("/v1/health").json() == {"status": "ok"}
    models = live.get("/v1/models").json()
    assert models["data"][0]["id"] == "demo" and models["data"][0]["meta"]["n_ctx"] == CONTEXT
    assert live.get("/models").json() == models
    props = live.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == CONTEXT
    assert props["model_path"] == "fomoe-demo-32x8.Q4_K_M.gguf"
    assert props["total_slots"] == 1 and "<|im_start|>" in props["chat_template"]
    (slot,) = live.get("/slots").json()
    assert slot["id"] == 0 and slot["n_ctx"] == CONTEXT and slot["is_processing"] is False


def test_completion(live: Live) -> None:
    found = completion(live)
    assert found["stop"] is True and found["stop_type"] == "limit" and found["model"] == "demo"
    assert found["tokens_predicted"] == 8 and found["prompt"] == PROMPT and found["truncated"] is False
    timings = found["timings"]
    assert timings["prompt_n"] + timings["cache_n"] == found["tokens_evaluated"]
    assert timings["predicted_n"] == 8 and timings["predicted_per_second"] > 0
    assert all(value is not None for value in timings.values())


def test_the_text_is_the_engines(live: Live) -> None:
    from fomoe_io.text.generation import Conversation
    from fomoe_io.text.sampler import Sampler, SamplingConfig

    engine = live.running.service.worker.engine
    assert engine is not None
    live.wait_until_idle()
    talk = Conversation(engine.timeline())
    sampler = Sampler(SamplingConfig(temperature=0))
    want = list(talk.generate(engine.tokenizer.encode(PROMPT), sampler, most=24))
    talk.session.close()
    found = completion(live, n_predict=24, return_tokens=True)
    assert found["content"] == "".join(text for _, text in want)
    assert found["tokens"] == [token for token, _ in want if token >= 0]


@pytest.mark.parametrize("path", ["/completion", "/completions"])
def test_a_stream_equals_the_whole(live: Live, path: str) -> None:
    whole = live.post(path, {"prompt": PROMPT, "n_predict": 12, "return_tokens": True}).json()
    chunks = live.stream(path, {"prompt": PROMPT, "n_predict": 12, "return_tokens": True})
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
    assert [token for chunk in chunks for token in chunk["tokens"]] == whole["tokens"]
    assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["tokens_predicted"] == 12 and chunks[-1]["stop_type"] == "limit"


def test_tokens_and_mixed_prompts(live: Live) -> None:
    tokens = live.post("/tokenize", {"content": PROMPT}).json()["tokens"]
    want = completion(live)["content"]
    assert completion(live, prompt=tokens)["content"] == want
    assert completion(live, prompt=[*tokens[:2], live.post("/detokenize", {"tokens": tokens[2:]}).json()["content"]])[
        "content"
    ] == want  # fmt: skip


def test_several_prompts(live: Live) -> None:
    tokens = live.post("/tokenize", {"content": PROMPT}).json()["tokens"]
    want = completion(live)
    for several in ([tokens, tokens], [tokens, PROMPT], [PROMPT, [PROMPT]]):
        found = completion(live, prompt=several)
        assert [one["content"] for one in found] == [want["content"]] * 2
        assert [one["prompt"] for one in found] == [PROMPT] * 2 and [one["index"] for one in found] == [0, 1]
    refused(live.post("/completion", {"prompt": [1, [2]]}), 400, "invalid_request_error", "mixes")
    refused(live.post("/completion", {"prompt": [PROMPT] * 17}), 400, "invalid_request_error", "17 answers")


def test_seeds(live: Live) -> None:
    hot = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "n_predict": 16}
    assert completion(live, seed=7, **hot)["content"] == completion(live, seed=7, **hot)["content"]
    assert len({completion(live, seed=seed, **hot)["content"] for seed in range(4)}) > 1
    assert len({completion(live, seed=-1, **hot)["content"] for _ in range(4)}) > 1


def test_stop_words(live: Live) -> None:
    whole = completion(live, n_predict=20)["content"]
    word = whole.split()[2]
    for form in (word, [word], ["not there", word]):
        found = completion(live, n_predict=20, stop=form)
        assert found["content"] == whole[: whole.index(word)]
        assert found["stop_type"] == "word" and found["stopping_word"] == word
    never = {"prompt": PROMPT, "n_predict": 20, "stop": [whole[:-1] + "#", "☃"], "return_tokens": True}
    held, chunks = completion(live, **never), live.stream("/completion", never)
    assert [token for chunk in chunks for token in chunk["tokens"]] == held["tokens"] and len(held["tokens"]) == 20
    assert "".join(chunk["content"] for chunk in chunks) == held["content"] == whole and len(chunks) < 20
    chunks = live.stream("/completion", {"prompt": PROMPT, "n_predict": 20, "stop": [word]})
    assert "".join(chunk["content"] for chunk in chunks) == whole[: whole.index(word)]
    assert chunks[-1]["stopping_word"] == word


def test_probabilities(live: Live) -> None:
    found = completion(live, n_probs=5, n_predict=4)
    assert len(found["completion_probabilities"]) == 4
    for entry in found["completion_probabilities"]:
        top = entry["top_logprobs"]
        assert len(top) == 5 and top[0]["id"] == entry["id"] and top[0]["logprob"] == entry["logprob"]
        assert [token["logprob"] for token in top] == sorted((token["logprob"] for token in top), reverse=True)
        assert bytes(entry["bytes"]).decode() == entry["token"]
    assert "".join(entry["token"] for entry in found["completion_probabilities"]) == found["content"]
    chunks = live.stream("/completion", {"prompt": PROMPT, "n_probs": 5, "n_predict": 4})
    streamed = [entry for chunk in chunks for entry in chunk.get("completion_probabilities", [])]
    assert streamed == found["completion_probabilities"]


@pytest.mark.parametrize("form", ["pairs", "mapping", "false", "text"])
def test_logit_bias(live: Live, form: str) -> None:
    first = completion(live, n_probs=1, n_predict=1)["completion_probabilities"][0]
    forms = {
        "pairs": [[first["id"], -100]],
        "mapping": {str(first["id"]): -100},
        "false": [[first["id"], False]],
        "text": [[first["token"], -100]],
    }
    found = completion(live, n_predict=8, logit_bias=forms[form], return_tokens=True)
    assert first["id"] not in found["tokens"]
    wanted = live.post("/tokenize", {"content": " river"}).json()["tokens"]
    assert completion(live, n_predict=1, logit_bias=[[wanted[0], 100]], return_tokens=True)["tokens"] == wanted[:1]


def test_penalties(live: Live) -> None:
    plain = completion(live, n_predict=40, return_tokens=True)["tokens"]
    for penalty in ({"presence_penalty": 50}, {"frequency_penalty": 50}, {"repeat_penalty": 50}):
        found = completion(live, n_predict=40, return_tokens=True, repeat_last_n=-1, **penalty)["tokens"]
        assert len(set(found)) == 40 > len(set(plain)), penalty
    assert completion(live, n_predict=40, return_tokens=True, presence_penalty=50, repeat_last_n=0)["tokens"] == plain


def test_no_tokens_are_predicted_when_none_are_wanted(live: Live) -> None:
    found = completion(live, n_predict=0)
    assert found["content"] == "" and found["tokens_predicted"] == 0 and found["timings"]["predicted_per_second"] == 0


def test_the_context_ends_an_answer(live: Live) -> None:
    found = completion(live, n_predict=-1, ignore_eos=True, return_tokens=True)
    # as fomoe-run: the last token needs no room, for nobody reads it
    assert found["tokens_evaluated"] + len(found["tokens"]) == CONTEXT + 1
    assert found["stop_type"] == "limit"


def test_a_prompt_that_is_too_long(live: Live) -> None:
    for path, body in {
        "/completion": {"prompt": [5] * CONTEXT},
        "/v1/completions": {"prompt": [5] * CONTEXT},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a b " * CONTEXT}]},
        "/v1/responses": {"input": "a b " * CONTEXT},
    }.items():
        error = refused(live.post(path, body), 400, "exceed_context_size_error")
        assert error["n_ctx"] == CONTEXT <= error["n_prompt_tokens"]
    response = live.post("/v1/messages", {"messages": [{"role": "user", "content": "a b " * CONTEXT}], "max_tokens": 1})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_cached_tokens_are_those_of_the_last_answer(live: Live) -> None:
    first = completion(live, return_tokens=True)
    tokens = live.post("/tokenize", {"content": PROMPT}).json()["tokens"] + first["tokens"]
    more = live.post("/tokenize", {"content": " and then"}).json()["tokens"]
    found = completion(live, prompt=tokens + more)
    assert found["timings"]["cache_n"] == len(tokens) - 1  # the last one was shown and not read
    assert found["timings"]["prompt_n"] == len(more) + 1 and found["tokens_cached"] == len(tokens) - 1
    fresh = completion(live, prompt=tokens + more, cache_prompt=False)
    assert fresh["timings"]["cache_n"] == 0 and fresh["content"] == found["content"]


def test_progress(live: Live) -> None:
    prompt = [40 + i for i in range(100)]
    chunks = live.stream("/completion", {"prompt": prompt, "n_predict": 2, "return_progress": True})
    progress = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert [p["processed"] for p in progress] == [0, 32, 64, 96, 100]
    assert all(p["total"] == 100 and p["cache"] == 0 for p in progress)


def test_timings_per_token(live: Live) -> None:
    chunks = live.stream("/completion", {"prompt": PROMPT, "n_predict": 4, "timings_per_token": True})
    assert [chunk["timings"]["predicted_n"] for chunk in chunks] == [1, 2, 3, 4, 4]


def test_several_answers(live: Live) -> None:
    hot = {"temperature": 1.5, "seed": 3, "n_predict": 8}
    found = completion(live, n=3, **hot)
    assert [one["index"] for one in found] == [0, 1, 2]
    assert found[0]["content"] == completion(live, **hot)["content"]
    assert len({one["content"] for one in found}) > 1


def test_an_answer_that_would_not_fit_in_memory(serve: Any) -> None:
    live = serve()
    body = {"prompt": PROMPT, "n_predict": -1, "n_probs": 100, "n": 16}
    refused(live.post("/completion", body), 400, "invalid_request_error", "probabilities", "stream")
    assert live.post("/completion", {**body, "n_predict": 2}).status_code == 200


def test_tokenize(live: Live) -> None:
    text = "Ein Größenvergleich: ☃ 1234\n"
    tokens = live.post("/tokenize", {"content": text}).json()["tokens"]
    assert live.post("/detokenize", {"tokens": tokens}).json() == {"content": text}
    pieces = live.post("/tokenize", {"content": text, "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == tokens
    raw = b"".join(p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces)
    assert raw.decode() == text
    special = live.post("/tokenize", {"content": "<|im_end|>"}).json()["tokens"]
    assert len(special) == 1
    assert len(live.post("/tokenize", {"content": "<|im_end|>", "parse_special": False}).json()["tokens"]) > 1


def test_a_half_character_is_text(live: Live) -> None:
    assert live.post("/tokenize", content=b'{"content": "a\\ud800b"}').status_code in (200, 400)


def test_apply_template(live: Live) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    found = live.post("/apply-template", {"messages": messages}).json()["prompt"]
    assert found == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_metrics(live: Live) -> None:
    before = live.metric("llamacpp:tokens_predicted_total"), live.metric('fomoe_requests_total{outcome="finished"}')
    completion(live, n_predict=9)
    live.wait_until_idle()
    assert live.metric("llamacpp:tokens_predicted_total") == before[0] + 8  # the last is not read
    assert live.metric('fomoe_requests_total{outcome="finished"}') == before[1] + 1
    text = live.get("/metrics").text
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \S+ .+|[a-z_:]+(\{[a-z]+=\"[a-z]+\"\})? [0-9.e+-]+", line), line
    hits = sum(live.metric(f'fomoe_expert_hits_total{{tier="{tier}"}}') for tier in ("vram", "dram", "nvme"))
    assert hits == live.metric("fomoe_expert_requests_total") > 0


@pytest.mark.parametrize("path", ["/embedding", "/v1/embeddings", "/rerank", "/infill", "/lora-adapters", "/slots/0"])
def test_what_other_servers_do(live: Live, path: str) -> None:
    refused(live.post(path, {}), 501, "not_supported_error")


def test_what_can_be_switched_off(serve: Any) -> None:
    live = serve(has_metrics=False, has_slots=False, has_page=False)
    refused(live.get("/metrics"), 501, "not_supported_error", "--no-metrics")
    refused(live.get("/slots"), 501, "not_supported_error", "--no-slots")
    assert live.get("/").status_code == 404


def test_paths_and_methods(live: Live) -> None:
    refused(live.get("/nothing"), 404, "not_found_error")
    response = live.get("/completion")
    refused(response, 405, "invalid_request_error")
    assert response.headers["allow"] == "POST"
    assert live.http.head("/health").status_code == 200


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"grammar": "root ::= 'a'"}, "grammar"),
        ({"json_schema": {"type": "thing"}}, "thing"),
        ({"grammar_lazy": True}, "grammar_lazy"),
        ({"mirostat": 2}, "mirostat"),
        ({"xtc_probability": 0.5}, "xtc_probability"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"id_slot": 3}, "id_slot"),
        ({"n_keep": 5}, "n_keep"),
        ({"image_data": []}, "image_data"),
        ({"temperatures": 1}, "temperatures"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 1000}, "n"),
        ({"n_predict": 1.5}, "n_predict"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": [[8192, 1]]}, "8192"),
        ({"logit_bias": [[1, True]]}, "bias"),
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "empty"),
        ({"prompt": [-1]}, "-1"),
        ({"prompt": [1 << 40]}, "token"),
        ({"prompt": {"a": 1}}, "prompt"),
    ],
)
def test_nothing_is_ignored(live: Live, fields: dict[str, Any], word: str) -> None:
    refused(live.post("/completion", {"prompt": PROMPT, "n_predict": 1, **fields}), 400, "invalid_request_error", word)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}},
        {"typical_p": 1.0, "mirostat": 0, "dry_multiplier": 0, "xtc_probability": 0.0, "grammar": ""},
        {"id_slot": 0, "tools": [], "stop": None, "seed": None, "stop_": None},
    ],
)
def test_what_asks_for_nothing_is_accepted(live: Live, fields: dict[str, Any]) -> None:
    assert completion(live, n_predict=1, **fields)["tokens_predicted"] == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        base64.b64encode(b"x" * 100),
    ],
)
def test_bodies_that_are_no_request(live: Live, body: bytes) -> None:
    refused(live.http.post("/completion", content=body), 400, "invalid_request_error")
