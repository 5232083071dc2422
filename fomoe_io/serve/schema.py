"""Bodies of requests: bounded before they are parsed, typed, and without a field that would be ignored."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from fomoe_io.serve.errors import bad_request
from fomoe_io.serve.settings import MOST_CHOICES, MOST_PROBABILITIES, MOST_STOPS

MOST_DEPTH = 32
MOST_VALUES = 1 << 20
"""Lists, objects and separators of a body: a parsed value takes up to a hundred times its text."""

HARMLESS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "betas", "cache_control"}
)  # fmt: skip
"""About the account or the bill, or advice on caching: without effect on an answer here, and documented so."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_n_sigma": (-1, 0),
    "xtc_probability": (0,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "n_keep": (0, -1),
    "n_discard": (0,),
    "n_indent": (0,),
    "min_keep": (0,),
    "t_max_predict_ms": (-1, 0),
    "post_sampling_probs": (False,),
    "id_slot": (-1, 0),
    "backend_sampling": (False,),
    "add_generation_prompt": (True,),
    "background": (False,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto", {"type": "none"}, {"type": "auto"}),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "grammar": ("",),
    "json_schema": ({},),
    "lora": ([],),
    "modalities": (["text"],),
    "truncation": ("disabled",),
    "suffix": ("",),
    "verbosity": ("medium",),
    "mcp_servers": ([],),
    "include": ([], ["reasoning.encrypted_content"]),
}
"""Values that ask for nothing, of fields that are refused with any other value."""

_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{\]},]')

T = TypeVar("T", bound=msgspec.Struct)

Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-100, le=100)]
Stops = str | Annotated[list[str], Meta(max_length=MOST_STOPS)]


class Sampled(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What all dialects but Anthropic's and the responses' have in common."""

    model: str = ""
    stream: bool = False
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, Meta(le=1 << 24)] | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    repeat_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, le=1 << 20)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: int | None = None
    stop: Stops | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] = 1
    n_predict: Annotated[int, Meta(ge=-1)] | None = None
    max_tokens: Annotated[int, Meta(ge=-1)] | None = None
    logit_bias: dict[str, float] | list[tuple[int | str, float | bool]] | None = None
    n_probs: Annotated[int, Meta(ge=0, le=MOST_PROBABILITIES)] | None = None
    ignore_eos: bool = False
    cache_prompt: bool = True
    return_progress: bool = False
    timings_per_token: bool = False
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object, once its depth and size are known to be sane.

    Raises
    ------
    ApiError
    """
    depth = values = 0
    for match in _STRUCTURE.finditer(body):
        character = match[0]
        if character in (b"[", b"{"):
            depth += 1
        elif character in (b"]", b"}"):
            depth -= 1
        else:
            values += character == b","
        if depth > MOST_DEPTH or values > MOST_VALUES:
            raise bad_request("the body is nested too deeply or holds too many values")
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"the body is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise bad_request("the body is no JSON object")
    return document


def read(body: bytes, kind: type[T]) -> T:
    """A request of this kind.

    Raises
    ------
    ApiError
        400, naming the field that is wrong, unknown or not supported.
    """
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    document = {
        name: value
        for name, value in parse(body).items()
        if value is not None and name not in HARMLESS and (name in known or not _asks_for_nothing(name, value))
    }
    for name in document:
        if name in NEUTRAL and name not in known:
            raise bad_request(f"{name} is not supported", param=name)
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise bad_request(_as_a_sentence(str(error))) from None


def _asks_for_nothing(name: str, value: Any) -> bool:
    # True == 1 in Python, and not in JSON
    return any(
        isinstance(value, bool) == isinstance(neutral, bool) and value == neutral for neutral in NEUTRAL.get(name, ())
    )


def _as_a_sentence(message: str) -> str:
    """msgspec's message in the words of the API."""
    unknown = re.search(r"unknown field `([^`]*)`(.*)", message)
    if unknown:
        return f"field {unknown[1]!r} is not supported{unknown[2].replace(' - at `$', ' in `')}"
    return message.replace("`$.", "`")
