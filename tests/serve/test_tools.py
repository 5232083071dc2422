"""Functions, schemas and grammars over HTTP: in all dialects, streamed and whole, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fomoe_io import Engine
from fomoe_io.kept.timeline import Timeline
from fomoe_io.serve.settings import ServeConfig
from tests.serve.conftest import GREEDY, Live, serving

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
pytest.importorskip("llguidance")

TEMPLATE = """\
{%- if tools %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call with <tool_call>
{"name": "f", "arguments": {}}
</tool_call>
{% endif %}
{%- for m in messages %}{{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}
{% endfor %}
{%- if thinks %}<think>
{% else %}[{{ enable_thinking }}]<think></think>{% endif %}"""

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "Of days to come", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {},
                                                                   "additionalProperties": False}}},
]  # fmt: skip
NAMED = {"type": "function", "function": {"name": "weather"}}
ASK: list[dict[str, Any]] = [{"role": "user", "content": "Will it rain?"}]
FLAT: list[dict[str, Any]] = [{"type": "function", **tool["function"]} for tool in TOOLS]
BLOCKS: list[dict[str, Any]] = [
    {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOLS
]
ANIMAL = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "old": {"type": "boolean"}},
    "required": ["kind", "old"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tooled(open_tiny: Callable[[], Engine]) -> Iterator[Live]:
    config = ServeConfig(port=0, alias="demo", sampling=GREEDY, chat_template=TEMPLATE, keep_alive_seconds=0.2)
    with serving(open_tiny, config) as server:
        yield server


@pytest.fixture(scope="module")
def client(tooled: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def other(tooled: Live) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=tooled.url, api_key="none", max_retries=0) as client:
        yield client


def chat(client: Any, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "any", "messages": ASK, "max_tokens": 96, **fields})


def check_weather(arguments: str | dict[str, Any]) -> None:
    found = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert found["city"] in ("Oslo", "Rome") and 1 <= found["days"] <= 9 and len(found) == 2


# ---- OpenAI's chat ----


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
