"""Functions over HTTP, as OpenAI's responses and Anthropic's messages have them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.conftest import Imported, Live
from tests.serve.tool_requests import ANIMAL, ASK, BLOCKS, FLAT, TOOLS, check_weather

openai = Imported("openai")
anthropic = Imported("anthropic")
pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def client(tooled: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def other(tooled: Live) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=tooled.url, api_key="none", max_retries=0) as client:
        yield client


# ---- OpenAI's responses ----


def respond(client: Any, **fields: Any) -> Any:
    return client.responses.create(**{"model": "any", "input": "Will it rain?", "max_output_tokens": 96, **fields})


CALLS: dict[str, Any] = {
    "tools": FLAT,
    "tool_choice": {"type": "function", "name": "weather"},
    "parallel_tool_calls": False,
}


def test_responses_call(client: Any) -> None:
    found = respond(client, **CALLS)
    (item,) = found.output
    assert found.status == "completed" and item.type == "function_call" and item.name == "weather" and item.call_id
    check_weather(item.arguments)
    assert found.tool_choice.name == "weather" and found.tools[0].name == "weather"


def test_a_stream_of_items_equals_the_whole(client: Any) -> None:
    whole = respond(client, **CALLS).output[0]
    events = list(respond(client, stream=True, **CALLS))
    kinds = [event.type for event in events]
    assert kinds[2] == "response.output_item.added" and kinds[3] == "response.function_call_arguments.delta"
    assert kinds[-3:] == [
        "response.function_call_arguments.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    text = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert text == whole.arguments == events[-1].response.output[0].arguments
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_responses_go_on_after_a_call(client: Any) -> None:
    first = respond(client, **CALLS)
    call = first.output[0]
    items = [
        {"role": "user", "content": "Will it rain?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "dry"},
    ]
    found = respond(client, input=items, tools=FLAT, max_output_tokens=4, include=["reasoning.encrypted_content"])
    assert found.output_text


def test_responses_in_a_schema(client: Any) -> None:
    form = {"format": {"type": "json_schema", "name": "animal", "schema": ANIMAL, "strict": True}}
    found = respond(client, text=form, reasoning={"effort": "none", "summary": "auto"})
    assert json.loads(found.output_text)["kind"] in ("cat", "dog") and found.status == "completed"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [{"type": "custom", "name": "f"}]}, "custom"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": FLAT, "tool_choice": {"type": "web_search"}}, "web_search"),
        ({"input": [{"type": "function_call", "name": "f"}, {"type": "item_reference", "id": "1"}]}, "item_reference"),
        ({"input": [{"type": "reasoning", "id": "1", "content": [{"text": 5}]}, {"role": "user"}]}, "reasoning"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
    ],
)
def test_responses_refuse(client: Any, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(openai.BadRequestError, match=word):
        respond(client, **fields)


# ---- Anthropic's messages ----


def message(client: Any, **fields: Any) -> Any:
    return client.messages.create(**{"model": "any", "messages": ASK, "max_tokens": 96, **fields})


USE: dict[str, Any] = {
    "tools": BLOCKS,
    "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
}


def test_messages_use_tools(other: Any) -> None:
    found = message(other, **USE)
    (block,) = found.content
    assert found.stop_reason == "tool_use" and block.type == "tool_use" and block.name == "weather" and block.id
    check_weather(block.input)


def test_a_stream_of_blocks_equals_the_whole(other: Any, tooled: Live) -> None:
    whole = message(other, **USE).content[0]
    with other.messages.stream(model="any", messages=ASK, max_tokens=96, **USE) as stream:
        found = stream.get_final_message()
    assert found.content[0].input == whole.input and found.stop_reason == "tool_use"
    events = tooled.stream("/v1/messages", {"messages": ASK, "max_tokens": 96, **USE})
    kinds = [event["type"] for event in events]
    assert kinds[2] == "content_block_start" and events[2]["content_block"]["input"] == {}
    assert {event["delta"]["type"] for event in events if event["type"] == "content_block_delta"} == {
        "input_json_delta"
    }


def test_any_tool(other: Any) -> None:
    choice = {"type": "any", "disable_parallel_tool_use": True}
    assert message(other, tools=BLOCKS, tool_choice=choice).content[0].type == "tool_use"


def test_messages_go_on_after_a_result(other: Any) -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome", "days": 1}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "dry"}]}
    talk = [*ASK, {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use]},
            {"role": "user", "content": [result, {"type": "text", "text": "So?"}]}]  # fmt: skip
    found = message(other, messages=talk, tools=BLOCKS, max_tokens=4)
    counted = other.messages.count_tokens(model="any", messages=talk, tools=BLOCKS).input_tokens
    assert found.usage.input_tokens + found.usage.cache_read_input_tokens == counted
    alone = [*talk[:-1], {"role": "user", "content": [result]}]
    assert other.messages.count_tokens(model="any", messages=alone, tools=BLOCKS).input_tokens < counted


def test_tools_in_both_dialects_are_one_prompt(other: Any, tooled: Live) -> None:
    chat_tools = [{"type": "function", "function": {**tool["function"], "description": ""}} for tool in TOOLS]
    want = tooled.post("/v1/chat/completions", {"messages": ASK, "tools": chat_tools, "max_tokens": 1}).json()
    counted = other.messages.count_tokens(model="any", messages=ASK, tools=BLOCKS).input_tokens
    assert counted == want["usage"]["prompt_tokens"]


def test_messages_in_a_schema(other: Any) -> None:
    config = {"format": {"type": "json_schema", "schema": ANIMAL}, "effort": "low"}
    found = message(other, extra_body={"output_config": config})
    assert json.loads(found.content[0].text)["kind"] in ("cat", "dog")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"tools": [{"name": "f", "input_schema": {}, "defer_loading": True}]}, "defer_loading"),
        ({"tools": BLOCKS, "tool_choice": {"type": "some"}}, "some"),
        ({"tools": BLOCKS, "tool_choice": {"type": "tool", "name": "g"}}, "'g'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"extra_body": {"output_config": {"task_budget": 1}}}, "task_budget"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]},
         "tool_use"),
    ],
)  # fmt: skip
def test_messages_refuse(other: Any, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=word):
        message(other, **fields)
