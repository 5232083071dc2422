"""Bodies that nobody would send: each is answered or refused in the API's own form; no traceback, no hang, no 500."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fomoe_io import Engine
from fomoe_io.serve.settings import ServeConfig
from tests.serve.conftest import GREEDY, Live, serving
from tests.serve.tool_requests import ANIMAL, ASK, BLOCKS, FLAT, TEMPLATE, TOOLS

SCALE = float(os.environ.get("FOMOE_FUZZ_SCALE", "1"))
CALL = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
TALK = [*ASK, {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "dry"}]  # fmt: skip
USED = [*ASK, {"role": "assistant", "content": [{"type": "text", "text": "I look."}, {"type": "thinking",
        "thinking": "hm"}, {"type": "tool_use", "id": "1", "name": "now", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "dry"}]}]  # fmt: skip
ITEMS = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
         {"type": "reasoning", "id": "1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
         {"type": "function_call", "call_id": "1", "name": "now", "arguments": "{}"},
         {"type": "function_call_output", "call_id": "1", "output": "dry"}]  # fmt: skip
FORM = {"type": "json_schema", "json_schema": {"name": "animal", "schema": ANIMAL}}
SAMPLED = {"temperature": 1.0, "top_k": 40, "seed": 1, "stop": ["x"], "logit_bias": {"65": 1}, "n": 1, "n_probs": 2,
           "presence_penalty": 0.1, "repeat_last_n": 8, "max_tokens": 2}  # fmt: skip

BASES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": TALK, "tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True, **SAMPLED},
        {"messages": ASK, "response_format": FORM, "reasoning_effort": "low", "stream": True,
         "stream_options": {"include_usage": True}, "chat_template_kwargs": {"thinks": True}},
        {"messages": ASK, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "now"}}},
    ],
    "/v1/completions": [{"prompt": "Hello", "logprobs": 2, **SAMPLED}, {"prompt": ["a", [1, 2]], "stream": True}],
    "/v1/responses": [
        {"input": ITEMS, "instructions": "Be brief.", "tools": FLAT, "tool_choice": "auto", "max_output_tokens": 2,
         "reasoning": {"effort": "low"}, "include": [], "stream": True},
        {"input": "Hello", "text": {"format": {"type": "json_schema", "name": "a", "schema": ANIMAL}}},
    ],
    "/v1/messages": [
        {"messages": USED, "system": [{"type": "text", "text": "Be brief."}], "max_tokens": 2, "tools": BLOCKS,
         "tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"}, "stream": True},
        {"messages": ASK, "max_tokens": 2, "stop_sequences": ["x"], "output_config": {"effort": "low"}},
    ],
    "/v1/messages/count_tokens": [{"messages": USED, "tools": BLOCKS, "system": "Be brief."}],
    "/completion": [
        {"prompt": ["Hello", 65], "grammar": 'root ::= [a-z]{1,3} "x"*', **SAMPLED},
        {"prompt": "Hello", "json_schema": ANIMAL, "stream": True, "return_progress": True},
    ],
    "/tokenize": [{"content": "Hello", "add_special": True, "with_pieces": True}],
    "/detokenize": [{"tokens": [65, 66]}],
    "/apply-template": [{"messages": TALK, "tools": TOOLS, "chat_template_kwargs": {"thinks": False}}],
}  # fmt: skip

NASTY = st.sampled_from(
    [None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 1e308, 0.5, "", "x", "\0", "\ud800", "é" * 50,
     "none", "function", "root ::= " + "(" * 500, [], {}, [[]], [None], {"": None}, {"type": "text"},
     {"type": "object", "properties": {"a": {"$ref": "#"}}}, {"type": ["object"]}, {"$ref": "#/properties/a"},
     {"not": {}}, {"pattern": "(((a*)*)*)*b"}, [1] * 200]
)  # fmt: skip
VALUES = st.one_of(
    NASTY,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of everything within a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in inner for place in [(*path, key), *places(part, (*path, key))]]


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path, and a body that was right before something happened to it."""
    path = draw(st.sampled_from(sorted(BASES)))
    body = copy.deepcopy(draw(st.sampled_from(BASES[path])))
    for _ in range(draw(st.integers(1, 3))):
        known = places(body)
        if not known:
            break
        *way, last = draw(st.sampled_from(known))
        holder: Any = body
        for key in way:
            holder = holder[key]
        match draw(st.integers(0, 3)):
            case 0:
                del holder[last]
            case 1 if isinstance(holder, dict):
                holder[draw(st.sampled_from([*body, "other", "type", "name"]))] = copy.deepcopy(draw(VALUES))
            case _:
                holder[last] = copy.deepcopy(draw(VALUES))
    raw = json.dumps(body).encode()
    if draw(st.integers(0, 19)) == 0:
        cut = draw(st.integers(0, len(raw)))
        raw = raw[:cut] + draw(st.binary(max_size=4)) + raw[cut + draw(st.integers(0, 2)) :]
    return path, raw


@pytest.fixture(scope="module")
def target(open_tiny: Callable[[], Engine]) -> Iterator[Live]:
    config = ServeConfig(port=0, alias="tiny", sampling=GREEDY, chat_template=TEMPLATE, most_tokens=4)
    with serving(open_tiny, config) as server:
        yield server


def answered(live: Live, path: str, raw: bytes) -> int:
    """The status; the rest must be what clients can read."""
    response = live.http.post(path, content=raw, headers={"content-type": "application/json"}, timeout=20)
    assert response.status_code in (200, 400), (response.status_code, response.text, raw)
    if response.status_code == 400:
        error = response.json()["error"]
        assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 2000, raw
    elif "event-stream" in response.headers["content-type"]:
        assert b"server_error" not in response.content and b'"code":500' not in response.content, (response.text, raw)
    else:
        response.json()
    return response.status_code


FUZZ = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def explore(live: Live, capfd: pytest.CaptureFixture[str], examples: int) -> dict[int, int]:
    """Statuses of so many bodies."""
    found: dict[int, int] = {}

    @settings(max_examples=examples, **FUZZ)  # type: ignore[arg-type]
    @given(bodies())
    def run(drawn: tuple[str, bytes]) -> None:
        status = answered(live, *drawn)
        found[status] = found.get(status, 0) + 1

    run()
    live.wait_until_idle()
    log = capfd.readouterr().err
    assert "Traceback" not in log and "Error" not in log, log
    assert live.get("/health").status_code == 200
    return found


def test_bodies(target: Live, capfd: pytest.CaptureFixture[str]) -> None:
    found = explore(target, capfd, 150)
    assert found[200] > 20 and found[400] > 20, found  # or the mutations are too tame, or too wild


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
def test_bodies_by_the_thousand(target: Live, capfd: pytest.CaptureFixture[str]) -> None:
    explore(target, capfd, round(5000 * SCALE))


def test_the_bases_are_right(target: Live) -> None:
    for path, documents in BASES.items():
        for document in documents:
            assert answered(target, path, json.dumps(document).encode()) == 200, (path, document)
