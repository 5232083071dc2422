"""/v1/messages, with Anthropic's own package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.conftest import DIALOGUE, Imported, Live

anthropic = Imported("anthropic")

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "The river was"}]


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as client:
        yield client


def message(client: Any, **fields: Any) -> Any:
    return client.messages.create(**{"model": "any", "messages": HELLO, "max_tokens": 8, **fields})


def test_message(client: Any) -> None:
    found = message(client)
    assert found.id.startswith("msg_") and found.type == "message" and found.role == "assistant"
    assert [block.type for block in found.content] == ["text"] and found.content[0].text
    assert found.stop_reason == "max_tokens" and found.stop_sequence is None and found.usage.output_tokens == 8


def test_a_stream_equals_the_whole(client: Any) -> None:
    whole = message(client)
    with client.messages.stream(model="any", messages=HELLO, max_tokens=8) as stream:
        events = [event.type for event in stream]
        found = stream.get_final_message()
    assert found.content[0].text == whole.content[0].text and found.stop_reason == whole.stop_reason
    assert found.usage.output_tokens == 8
    raw = [event for event in events if event not in ("text", "ping")]
    assert raw[:2] == ["message_start", "content_block_start"]
    assert set(raw[2:-3]) == {"content_block_delta"}
    assert raw[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_events_on_the_wire(live: Live) -> None:
    events = live.stream("/v1/messages", {"messages": HELLO, "max_tokens": 3})
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0]["message"]["content"] == [] and events[0]["message"]["usage"]["output_tokens"] == 0


def test_system_and_blocks(client: Any, live: Live) -> None:
    blocks = [{"type": "text", "text": "The river "}, {"type": "text", "text": "was"}]
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    found = message(client, messages=[{"role": "user", "content": blocks}], system=system)
    chat = [{"role": "system", "content": "Be brief."}, *HELLO]
    want = live.post("/v1/chat/completions", {"messages": chat, "max_tokens": 8}).json()
    assert found.content[0].text == want["choices"][0]["message"]["content"]


def test_a_line_that_changes_with_every_request_is_no_part_of_the_prompt(client: Any) -> None:
    lengths = set()
    for number in range(3):
        text = f"x-anthropic-billing-header: cc_version=2; cch={'a' * number};\nBe brief."
        lengths.add(client.messages.count_tokens(model="any", messages=HELLO, system=text).input_tokens)
    assert lengths == {client.messages.count_tokens(model="any", messages=HELLO, system="Be brief.").input_tokens}


def test_count_tokens_and_usage(client: Any) -> None:
    counted = client.messages.count_tokens(model="any", messages=HELLO).input_tokens
    found = message(client)
    assert found.usage.input_tokens + found.usage.cache_read_input_tokens == counted


def test_a_conversation_is_read_once(serve: Any) -> None:
    live = serve(chat_template=DIALOGUE)
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as client:
        first = message(client)
        talk = [*HELLO, {"role": "assistant", "content": first.content[0].text}, *HELLO]
        usage = message(client, messages=talk).usage
        assert usage.cache_read_input_tokens == first.usage.input_tokens + first.usage.output_tokens - 1
        counted = client.messages.count_tokens(model="any", messages=talk).input_tokens
        assert usage.input_tokens + usage.cache_read_input_tokens == counted


def test_stop_sequences(client: Any) -> None:
    text = message(client, max_tokens=24).content[0].text
    word = text.split()[3]
    found = message(client, max_tokens=24, stop_sequences=["never", word])
    assert found.content[0].text == text[: text.index(word)]
    assert found.stop_reason == "stop_sequence" and found.stop_sequence == word


def test_thinking_blocks(serve: Any) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking != false %}<think>\n{% endif %}"
    live = serve(chat_template=template)
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as client:
        found = message(client, thinking={"type": "enabled", "budget_tokens": 1024})
        assert [block.type for block in found.content] == ["thinking"] and found.content[0].thinking
        assert message(client, thinking={"type": "disabled"}).content[0].type == "text"
        with client.messages.stream(model="any", messages=HELLO, max_tokens=8) as stream:
            streamed = stream.get_final_message()
        assert streamed.content[0].type == "thinking"
        assert streamed.content[0].thinking == found.content[0].thinking


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"tools": [{"name": "f", "input_schema": {"type": "object"}}]}, "tools"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]},
            "image",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_result"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "and"}]}, "assistant"),
        ({"messages": []}, "messages"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024, "depth": 3}}, "depth"),
        ({"extra_body": {"temperature": -2}}, "temperature"),
    ],
)
def test_what_is_not_supported_is_refused(client: Any, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=word) as caught:
        message(client, **fields)
    assert caught.value.body["type"] == "error" and caught.value.body["error"]["type"] == "invalid_request_error"
