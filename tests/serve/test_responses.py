"""/v1/responses, with OpenAI's own package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.conftest import Imported, Live

openai = Imported("openai")


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def respond(client: Any, **fields: Any) -> Any:
    return client.responses.create(**{"model": "any", "input": "The river was", "max_output_tokens": 8, **fields})


def test_response(client: Any) -> None:
    found = respond(client)
    assert found.id.startswith("resp_") and found.output[0].id.startswith("msg_")
    assert found.status == "incomplete" and found.incomplete_details.reason == "max_output_tokens"
    assert found.output_text and found.usage.output_tokens == 8
    assert found.usage.total_tokens == found.usage.input_tokens + 8


def test_it_is_a_chat(client: Any) -> None:
    want = client.chat.completions.create(
        model="any",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The river was"}],
        max_tokens=8,
    )
    items = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "The river was"}]}]
    for form in ("The river was", items):
        assert respond(client, instructions="Be brief.", input=form).output_text == want.choices[0].message.content


def test_a_stream_equals_the_whole(client: Any) -> None:
    whole = respond(client)
    events = list(respond(client, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text


def test_progress_and_timings(live: Live) -> None:
    body = {
        "input": "This is a test. " * 20,
        "max_output_tokens": 4,
        "return_progress": True,
        "timings_per_token": True,
    }
    events = live.stream("/responses", body)
    progress = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert all(event["type"] == "response.in_progress" for event in events if "prompt_progress" in event)
    assert progress[0]["processed"] == progress[0]["cache"] and progress[-1]["processed"] == progress[-1]["total"]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert all(event["timings"]["prompt_per_second"] > 0 for event in [*deltas, events[-1]])


def test_a_complete_one(client: Any) -> None:
    text = respond(client, max_output_tokens=20).output_text
    assert text
    events = list(respond(client, stream=True, max_output_tokens=1))
    assert events[-1].response.status == "incomplete"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "xml"}}}, "xml"),
        ({"text": {"verbosity": "low"}}, "text"),
        ({"input": [{"type": "file_search_call", "id": "1"}]}, "file_search_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "huge"}}, "huge"),
        ({"reasoning": {"summary": "detailed"}}, "summary"),
    ],
)
def test_what_is_not_supported_is_refused(client: Any, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(openai.BadRequestError, match=word):
        respond(client, **fields)
