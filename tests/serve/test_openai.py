"""/v1/chat/completions and /v1/completions, with OpenAI's own package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.conftest import DIALOGUE, Imported, Live

openai = Imported("openai")

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "The river was"}]


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: Any, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "any", "messages": HELLO, "max_tokens": 8, **fields})


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]


def test_chat(client: Any) -> None:
    found = chat(client)
    assert found.id.startswith("chatcmpl-") and found.object == "chat.completion" and found.model == "demo"
    choice = found.choices[0]
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length"
    assert found.usage.completion_tokens == 8
    assert found.usage.total_tokens == found.usage.prompt_tokens + 8
    assert found.usage.prompt_tokens_details.cached_tokens == 0


def test_a_chat_stream_equals_the_whole(client: Any) -> None:
    whole = chat(client, max_tokens=16)
    chunks = list(chat(client, max_tokens=16, stream=True, stream_options={"include_usage": True}))
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content is None
    assert last.choices[0].delta.content is None and last.choices[0].finish_reason == "length"
    assert all(chunk.choices[0].finish_reason is None for chunk in middle)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == whole.choices[0].message.content
    assert usage.choices == [] and usage.usage == whole.usage and usage.timings["predicted_n"] == 16
    assert {chunk.id for chunk in chunks} == {first.id} and first.object == "chat.completion.chunk"


def test_no_usage_in_a_stream_unless_asked(client: Any) -> None:
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chat(client, stream=True))


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_most_tokens(client: Any, name: str) -> None:
    found = chat(client, **{"max_tokens": openai.omit if hasattr(openai, "omit") else openai.NOT_GIVEN, name: 3})
    assert found.usage.completion_tokens == 3


def test_stop(client: Any) -> None:
    whole = chat(client, max_tokens=24).choices[0].message.content
    word = whole.split()[3]
    found = chat(client, max_tokens=24, stop=word).choices[0]
    assert found.message.content == whole[: whole.index(word)] and found.finish_reason == "stop"


def test_logprobs(client: Any) -> None:
    whole = chat(client, logprobs=True, top_logprobs=3)
    tokens = whole.choices[0].logprobs.content
    assert len(tokens) == 8 and all(len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.top_logprobs[0].token == token.token and token.logprob <= 0 for token in tokens)
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == whole.choices[0].message.content
    streamed = [
        token
        for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == tokens
    alone = chat(client, logprobs=True).choices[0].logprobs.content
    assert [token.logprob for token in alone] == [token.logprob for token in tokens]
    assert all(token.top_logprobs == [] for token in alone)


def test_several_choices(client: Any) -> None:
    hot: dict[str, Any] = {"temperature": 1.5, "seed": 11}
    found = chat(client, n=2, **hot)
    texts = [choice.message.content for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1] and texts[0] != texts[1]
    assert found.usage.completion_tokens == 16
    streamed = ["", ""]
    reasons = []
    for chunk in chat(client, n=2, stream=True, **hot):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    assert streamed == texts and reasons == ["length", "length"]
    assert chat(client, **hot).choices[0].message.content == texts[0]


def test_a_conversation_is_read_once(serve: Any) -> None:
    live = serve(chat_template=DIALOGUE)
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        first = chat(client)
        talk = [*HELLO, {"role": "assistant", "content": first.choices[0].message.content}, *HELLO]
        found = chat(client, messages=talk)
        # all that was read: the last token of the answer was shown only
        assert found.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens - 1
        fresh = chat(client, messages=talk, extra_body={"cache_prompt": False})
        assert fresh.usage.prompt_tokens_details.cached_tokens == 0
        assert fresh.choices[0].message.content == found.choices[0].message.content


def test_roles_and_parts(client: Any) -> None:
    parts = [{"type": "text", "text": "The river "}, {"type": "text", "text": "was"}]
    developer = chat(
        client, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    )
    system = chat(client, messages=[{"role": "system", "content": "Be brief."}, *HELLO])
    assert developer.choices[0].message.content == system.choices[0].message.content


def test_progress(client: Any) -> None:
    long = [{"role": "user", "content": "It was a dark and stormy night. " * 20}]
    extra = {"return_progress": True, "timings_per_token": True}
    chunks = list(chat(client, messages=long, max_tokens=2, stream=True, extra_body=extra))
    progress = [chunk.prompt_progress for chunk in chunks if getattr(chunk, "prompt_progress", None)]
    assert progress[-1]["processed"] == progress[-1]["total"] > 100 and len(progress) > 3
    assert chunks[-1].timings["predicted_n"] == 2


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "syntax": 1}}}, "syntax"),
        ({"response_format": {"type": "text", "syntax": 1}}, "syntax"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "tool_call_id"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "alien"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "and"}]}, "assistant"),
        ({"messages": [{"role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
         "image_url"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"extra_body": {"chat_template_kwargs": {"other": 1}}}, "chat_template_kwargs"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused(client: Any, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(openai.BadRequestError, match=word):
        chat(client, **fields)


def test_plain_text_may_be_asked_for(client: Any) -> None:
    assert chat(client, response_format={"type": "text"}, tool_choice="none", user="me").choices


def test_completions(client: Any) -> None:
    whole = client.completions.create(model="any", prompt="The river", max_tokens=8, logprobs=2)
    assert whole.object == "text_completion" and whole.id.startswith("cmpl-")
    (choice,) = whole.choices
    assert choice.finish_reason == "length" and "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    chunks = list(client.completions.create(model="any", prompt="The river", max_tokens=8, logprobs=2, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert chunks[-1].choices[0].finish_reason == "length"
    offsets = [o for c in chunks if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset]
    assert offsets == choice.logprobs.text_offset


def test_several_prompts(client: Any) -> None:
    texts = ["The river", "A dark"]
    found = client.completions.create(model="any", prompt=texts, max_tokens=6)
    alone = [client.completions.create(model="any", prompt=text, max_tokens=6) for text in texts]
    assert [choice.text for choice in found.choices] == [one.choices[0].text for one in alone]
    assert found.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)


@pytest.mark.parametrize("fields", [{"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"prompt": []}])
def test_completions_refuse(client: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**{"model": "any", "prompt": "a", "max_tokens": 1, **fields})


def test_thoughts(serve: Any) -> None:
    """A template that begins the thoughts: all that comes before </think> is one."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking != false %}<think>\n{% endif %}"
    live = serve(chat_template=template)
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        found = chat(client).choices[0].message
        assert found.content == "" and found.reasoning_content
        deltas = [chunk.choices[0].delta for chunk in chat(client, stream=True)]
        assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == found.reasoning_content
        plain = chat(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}}).choices[0].message
        assert plain.content and not hasattr(plain, "reasoning_content")
        raw = chat(client, extra_body={"reasoning_format": "none"}).choices[0].message
        assert raw.content.strip("\n") == found.reasoning_content.strip("\n")
