"""Functions over HTTP, as OpenAI's chat has them: streamed and whole, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fomoe_io import Engine
from fomoe_io.kept.timeline import Timeline
from tests.serve.conftest import Imported, Live
from tests.serve.tool_requests import ANIMAL, ASK, NAMED, TOOLS, chat, check_weather

openai = Imported("openai")
pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def client(tooled: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_named_function_is_called(client: Any) -> None:
    choice = chat(client, tools=TOOLS, tool_choice=NAMED, parallel_tool_calls=False).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert call.type == "function" and call.function.name == "weather" and call.id
    check_weather(call.function.arguments)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_some_function_is_called(client: Any, seed: int) -> None:
    hot: dict[str, Any] = {"temperature": 1.5, "seed": seed}
    choice = chat(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, **hot).choices[0]
    (call,) = choice.message.tool_calls
    if call.function.name == "weather":
        check_weather(call.function.arguments)
    else:
        assert (call.function.name, json.loads(call.function.arguments)) == ("now", {})


def test_a_stream_of_calls_equals_the_whole(client: Any) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": NAMED, "parallel_tool_calls": False}
    whole = chat(client, **fields).choices[0].message.tool_calls[0].function
    chunks = list(chat(client, stream=True, **fields))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [delta.index for delta in deltas] == [0] * len(deltas) and len(deltas) > 3
    assert deltas[0].id and deltas[0].function.name == whole.name and not any(delta.id for delta in deltas[1:])
    assert "".join(delta.function.arguments for delta in deltas) == whole.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert all(chunk.choices[0].delta.content is None for chunk in chunks)


def test_a_stream_that_has_nothing_to_say_yet_is_kept_alive(tooled: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call's head is held back for many tokens: a client that hears nothing hangs up."""
    decode = Timeline.decode

    def slow(self: Timeline, token: int) -> Any:
        time.sleep(0.05)
        return decode(self, token)

    monkeypatch.setattr(Timeline, "decode", slow)
    body = {"messages": ASK, "tools": TOOLS, "tool_choice": NAMED, "stream": True, "max_tokens": 20}
    text = tooled.post("/v1/chat/completions", body).text
    assert text.count(": keep-alive") >= 2


def test_the_packages_helper_for_streams(client: Any) -> None:
    with client.chat.completions.stream(
        model="any", messages=ASK, max_tokens=96, tools=TOOLS, tool_choice=NAMED, parallel_tool_calls=False
    ) as stream:
        found = stream.get_final_completion().choices[0].message.tool_calls
    check_weather(found[0].function.arguments)


def test_several_choices_call_each(client: Any) -> None:
    found = chat(client, n=2, tools=TOOLS, tool_choice=NAMED, parallel_tool_calls=False, temperature=1.2, seed=4)
    calls = [choice.message.tool_calls[0] for choice in found.choices]
    assert calls[0].id != calls[1].id
    for call in calls:
        check_weather(call.function.arguments)


def test_a_call_cut_short_says_so(client: Any) -> None:
    choice = chat(client, tools=TOOLS, tool_choice=NAMED, max_tokens=30).choices[0]
    assert choice.finish_reason == "length"


def test_of_its_own_accord_it_need_not_call(client: Any) -> None:
    choice = chat(client, tools=TOOLS, max_tokens=6).choices[0]
    assert choice.message.content and not choice.message.tool_calls and choice.finish_reason == "length"


def test_none_is_called_where_none_may_be(client: Any) -> None:
    """The prompt stays as it is with them, so that it need not be read again."""
    free = chat(client, tools=TOOLS, max_tokens=4)
    none = chat(client, tools=TOOLS, tool_choice="none", max_tokens=4)
    assert none.usage.prompt_tokens == free.usage.prompt_tokens and not none.choices[0].message.tool_calls


def test_a_conversation_with_results(client: Any, tooled: Live) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city":"Oslo","days":2}'},
    }
    talk = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "dry"}]  # fmt: skip
    assert chat(client, messages=talk, tools=TOOLS, max_tokens=4).choices[0].message.content
    text = tooled.post("/apply-template", {"messages": talk}).json()["prompt"]
    assert '"arguments": {"city": "Oslo", "days": 2}' in text and "tool: dry" in text
    with_tools = tooled.post("/apply-template", {"messages": talk, "tools": TOOLS}).json()["prompt"]
    assert with_tools.startswith(json.dumps(TOOLS[0]))


def test_arguments_that_are_no_object_stay_what_they_are(tooled: Live) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{broken"}}
    talk = [*ASK, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "?"}]
    assert '"{broken"' in tooled.post("/apply-template", {"messages": talk}).json()["prompt"]


def test_calls_and_a_schema_go_together(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": ANIMAL}}
    message = chat(client, tools=TOOLS, response_format=form, parallel_tool_calls=False).choices[0].message
    if message.tool_calls:
        assert message.tool_calls[0].function.name in ("weather", "now")
    else:
        assert json.loads(message.content)["kind"] in ("cat", "dog")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [{"type": "function"}]}, "function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "a b"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]}, "parameters"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "one name"),
        ({"tools": TOOLS, "tool_choice": "perhaps"}, "perhaps"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "'g'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": []}}}, "none of the tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "allowed_tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "extra_body": {"grammar": 'root ::= "a"'}}, "exclude"),
        ({"tools": TOOLS, "extra_body": {"reasoning_format": "none"}}, "reasoning_format"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": [{"type": "custom"}]}, *ASK]}, "tool_calls"),
        ({"messages": [*ASK, {"role": "tool", "content": [{"type": "image_url"}], "tool_call_id": "1"}]}, "image_url"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
    ],
)
def test_what_is_refused(client: Any, fields: dict[str, Any], word: str) -> None:
    extra = {"extra_body": {name: fields.pop(name) for name in ("functions", "function_call") if name in fields}}
    with pytest.raises(openai.BadRequestError, match=word):
        chat(client, **({**extra, **fields} if extra["extra_body"] else fields))


def test_a_template_without_tools(serve: Any, open_tiny: Callable[[], Engine]) -> None:
    response = serve(engine=open_tiny).post("/v1/chat/completions", {"messages": ASK, "tools": TOOLS, "max_tokens": 1})
    assert response.status_code == 400 and "template" in response.json()["error"]["message"]
