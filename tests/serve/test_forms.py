"""Schemas and grammars over HTTP, and thoughts before them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fomoe_io import Engine
from tests.serve.conftest import Imported, Live
from tests.serve.tool_requests import ANIMAL, ASK, TOOLS, chat

openai = Imported("openai")
pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def client(tooled: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# ---- schemas and grammars ----


@pytest.mark.parametrize("seed", [1, 2])
def test_json_schema(client: Any, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": ANIMAL, "strict": True}}
    choice = chat(client, response_format=form, temperature=1.3, seed=seed).choices[0]
    found = json.loads(choice.message.content)
    assert found["kind"] in ("cat", "dog") and isinstance(found["old"], bool) and choice.finish_reason == "stop"


def test_a_stream_of_json_equals_the_whole(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": ANIMAL}}
    whole = chat(client, response_format=form).choices[0].message.content
    chunks = chat(client, response_format=form, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_json_object(client: Any) -> None:
    choice = chat(client, response_format={"type": "json_object"}, max_tokens=20).choices[0]
    assert choice.message.content.lstrip().startswith("{")


def test_the_packages_helper_for_schemas(client: Any) -> None:
    import pydantic

    class Animal(pydantic.BaseModel):
        old: bool

    found = client.chat.completions.parse(model="any", messages=ASK, max_tokens=64, response_format=Animal)
    assert isinstance(found.choices[0].message.parsed, Animal)


def test_gbnf_in_chat(client: Any) -> None:
    choice = chat(client, extra_body={"grammar": 'root ::= "yes" | "no"'}).choices[0]
    assert choice.message.content in ("yes", "no") and choice.finish_reason == "stop"


def test_logprobs_of_a_grammar_are_the_models(client: Any) -> None:
    choice = chat(client, extra_body={"grammar": 'root ::= "yes"'}, logprobs=True, top_logprobs=2).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == "yes"
    assert tokens[0].top_logprobs[0].logprob >= tokens[0].logprob


@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
@pytest.mark.parametrize(
    "fields", [{"grammar": 'root ::= "a"{3}'}, {"json_schema": {"enum": ["aaa"]}}, {"grammar": "start: /aaa/"}]
)
def test_completions_follow_one(tooled: Live, path: str, fields: dict[str, Any]) -> None:
    found = tooled.post(path, {"prompt": "Say", "n_predict": 20, **fields}).json()
    text = found["content"] if path == "/completion" else found["choices"][0]["text"]
    assert text.strip('"') == "aaa"
    if path == "/completion":
        assert found["stop_type"] == "eos"


def test_no_bias_brings_back_what_a_grammar_forbids(tooled: Live) -> None:
    biased: dict[str, Any] = {"logit_bias": [["b", 100], ["a", False]], "grammar": 'root ::= "a"'}
    assert tooled.post("/completion", {"prompt": "Say", "n_predict": 4, **biased}).json()["content"] == "a"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"grammar": "root ::= ("}, "Expected"),
        ({"grammar": "root ::= missing"}, "missing"),
        ({"grammar": "x" * 100000}, "longer"),
        ({"json_schema": {"type": "nothing"}}, "nothing"),
        ({"json_schema": {"enum": [-(2**63)]}}, "the number"),
        ({"json_schema": {"$ref": "file:///etc/passwd"}}, "wrong"),
        ({"json_schema": {"enum": [1]}, "grammar": 'root ::= "a"'}, "both"),
        ({"grammar": 'root ::= "a"', "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_a_wrong_grammar_is_told(tooled: Live, fields: dict[str, Any], word: str) -> None:
    response = tooled.post("/completion", {"prompt": "Say", "n_predict": 4, **fields})
    assert response.status_code == 400 and word in response.json()["error"]["message"]
    assert tooled.running.service.queue.at_work == 0


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_grammar_that_comes_to_be_too_much(tooled: Live, is_stream: bool) -> None:
    """It is the request's fault, whenever it turns out."""
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
    body = {"prompt": "Say", "n_predict": 20, "json_schema": schema}
    if is_stream:
        error = tooled.stream("/completion", body)[-1]["error"]
    else:
        response = tooled.post("/completion", body)
        error = response.json()["error"]
        assert response.status_code == 400
    assert error["code"] == 400 and "can't be followed" in error["message"]
    assert tooled.post("/completion", {"prompt": "Say", "n_predict": 1}).status_code == 200


def test_without_the_package_it_says_what_to_install(tooled: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    bodies: list[dict[str, Any]] = [
        {"response_format": {"type": "json_object"}},
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "parallel_tool_calls": False},
        {"grammar": 'root ::= "a"'},
    ]
    for body in bodies:
        response = tooled.post("/v1/chat/completions", {"messages": ASK, "max_tokens": 2, **body})
        assert response.status_code == 400 and "fomoe_io[grammar]" in response.json()["error"]["message"]
    free = tooled.post("/v1/chat/completions", {"messages": ASK, "max_tokens": 2, "tools": TOOLS})
    assert free.status_code == 200


# ---- thinking ----


def test_thoughts_come_before_a_schema(tooled: Live) -> None:
    """Until they end, nothing is forbidden; this model never ends them."""
    body = {"messages": ASK, "max_tokens": 8, "json_schema": ANIMAL, "chat_template_kwargs": {"thinks": True}}
    message = tooled.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert message["reasoning_content"] and not message["content"]
    plain = tooled.post("/v1/chat/completions", {**body, "chat_template_kwargs": {"thinks": False}}).json()
    assert plain["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("effort", "want"), [("none", "[False]"), ("low", "[True]"), ("medium", "[True]"), ("high", "[True]")]
)
def test_effort_turns_thoughts_on_and_off(tooled: Live, effort: str, want: str) -> None:
    text = tooled.post("/apply-template", {"messages": ASK, "reasoning_effort": effort}).json()["prompt"]
    assert want in text


def test_effort_is_a_level_where_the_template_has_levels(serve: Any, open_tiny: Callable[[], Engine]) -> None:
    live = serve(engine=open_tiny, chat_template="{{ messages[0].content }}|{{ reasoning_effort or 'medium' }}|")
    wants = [("low", "|low|"), ("minimal", "|low|"), ("high", "|high|"), (None, "|medium|")]
    for effort, want in wants:
        body = {"messages": ASK, **({"reasoning_effort": effort} if effort else {})}
        assert want in live.post("/apply-template", body).json()["prompt"]
    refused = live.post("/apply-template", {"messages": ASK, "reasoning_effort": "none"})
    assert refused.status_code == 400 and "always thinks" in refused.json()["error"]["message"]


def test_contradictions_are_told(tooled: Live) -> None:
    body = {"messages": ASK, "reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}
    assert tooled.post("/v1/chat/completions", body).status_code == 400
