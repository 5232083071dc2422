"""Functions, a schema and a template for them, and what must be true of a call."""

from __future__ import annotations

import json
from typing import Any

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


def check_weather(arguments: str | dict[str, Any]) -> None:
    found = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert found["city"] in ("Oslo", "Rome") and 1 <= found["days"] <= 9 and len(found) == 2


def chat(client: Any, **fields: Any) -> Any:
    """A chat completion by the openai package."""
    return client.chat.completions.create(**{"model": "any", "messages": ASK, "max_tokens": 96, **fields})
