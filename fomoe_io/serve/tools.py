"""What a request wants of an answer's form: functions that may be called, a schema, a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from fomoe_io.errors import UsageError
from fomoe_io.serve.errors import ApiError, bad_request
from fomoe_io.serve.prompts import ChatPrompt, Prompts
from fomoe_io.serve.replays import SampledCalls
from fomoe_io.serve.sampling import Choosing
from fomoe_io.serve.schema import Sampled
from fomoe_io.serve.thoughts import CallSplitter, Splitter, ThoughtSplitter
from fomoe_io.text.grammar import Form, check_package, grammar_form, json_form
from fomoe_io.text.tool_formats import (
    HARMONY,
    Function,
    Thoughts,
    ToolFormat,
    may_call,
    must_call,
    must_not_call,
    with_thoughts,
)
from fomoe_io.text.tool_parser import CallParser, HarmonyParser

MOST_TOOLS = 512
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Tools:
    """Functions that a request offers.

    Attributes
    ----------
    listed : sequence of dict
        In OpenAI's form, which templates take.
    functions : sequence of Function
    choice : str
    only : str or None
        The one that must be called.
    is_parallel : bool
        Whether an answer may have several calls.
    """

    listed: Sequence[dict[str, Any]]
    functions: Sequence[Function]
    choice: Literal["none", "auto", "required"] = "auto"
    only: str | None = None
    is_parallel: bool = True

    @property
    def callable(self) -> Sequence[Function]:
        """Those that may be called."""
        return [function for function in self.functions if self.only in (None, function.name)]


class CallReading(NamedTuple):
    """How calls are found in an answer."""

    known: ToolFormat
    schemas: Mapping[str, Mapping[str, Any]]
    sampled: SampledCalls | None = None
    """Where answers with calls are remembered as they were written."""


def splitter(*, is_thinking: bool, splits_thoughts: bool, calls: CallReading | None) -> Splitter:
    """Of an answer."""
    thoughts = ThoughtSplitter(is_thinking=is_thinking, splits=splits_thoughts)
    if calls is None:
        return thoughts
    if calls.known is HARMONY:
        return HarmonyParser()
    return CallSplitter(thoughts, CallParser(calls.known, calls.schemas))


# ---- reading requests ----


def chat_tools(tools: Any, choice: Any, parallel: bool | None) -> Tools | None:
    """`tools`, `tool_choice` and `parallel_tool_calls` of OpenAI's chat.

    Raises
    ------
    ApiError
        Naming what is wrong or not supported.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise bad_request("tool_choice asks for a call, and there are no tools", param="tool_choice")
        return None
    if not isinstance(tools, list) or len(tools) > MOST_TOOLS:
        raise bad_request(f"tools is no list of at most {MOST_TOOLS}", param="tools")
    functions = [_function(number, tool) for number, tool in enumerate(tools)]
    if len({function.name for function in functions}) < len(functions):
        raise bad_request("two tools have one name", param="tools")
    known = {"none": "none", "auto": "auto", "required": "required", None: "auto"}
    if not isinstance(choice, dict) and (isinstance(choice, list) or choice not in known):
        raise bad_request(f"tool_choice {choice!r} is not supported", param="tool_choice")
    is_parallel = parallel is not False
    if not isinstance(choice, dict):
        return Tools(tools, functions, known[choice], is_parallel=is_parallel)  # type: ignore[arg-type]
    name = choice.get("function", {}).get("name") if isinstance(choice.get("function"), dict) else None
    if choice.get("type") != "function" or name is None:
        raise bad_request(f"tool_choice of type {choice.get('type')!r} is not supported", param="tool_choice")
    if name not in [function.name for function in functions]:  # which may be anything, also what has no hash
        raise bad_request(f"tool_choice names {name!r}, which is none of the tools", param="tool_choice")
    return Tools(tools, functions, "required", name, is_parallel)


def _function(number: int, tool: Any) -> Function:
    where = f"tools[{number}]"
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function" or not isinstance(tool.get("function"), dict):
        raise bad_request(f"{where}: tools of type {kind!r} are not supported, only functions are", param="tools")
    function = tool["function"]
    name, schema = function.get("name"), function.get("parameters") or {}
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad_request(f"{where}: {name!r} is no name of a function", param="tools")
    if not isinstance(schema, dict) or not all(
        isinstance(schema.get(key, {}), dict) for key in ("properties", "$defs")
    ):
        raise bad_request(f"{where}.parameters is no JSON schema of an object", param="tools")
    if not isinstance(function.get("description") or "", str) or not isinstance(schema.get("required") or [], list):
        raise bad_request(f"{where} is no description of a function", param="tools")
    return Function(name, schema, function.get("strict") is True)


def calls_of_message(calls: Any, where: str) -> list[dict[str, Any]]:
    """An assistant's `tool_calls` as templates take them: arguments as an object, where they are one."""
    if not isinstance(calls, list):
        raise bad_request(f"{where}.tool_calls is no list", param="messages")
    found = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise bad_request(f"{where}.tool_calls[{number}] is no call of a function", param="messages")
        name, arguments = function.get("name"), function.get("arguments", "")
        if not isinstance(name, str) or not isinstance(arguments, str | dict):
            raise bad_request(f"{where}.tool_calls[{number}] has no name, or no arguments", param="messages")
        found.append(chat_call(str(call.get("id", "")), name, arguments))
    return found


def chat_call(identity: str, name: str, arguments: str | dict[str, Any]) -> dict[str, Any]:
    """A call as templates take it; arguments that are no JSON object stay the text that they are."""
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            read = None
        arguments = read if isinstance(read, dict) else arguments
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def response_form(wanted: Any, *, schema_key: str | None = "json_schema") -> Form | None:
    """`response_format` of OpenAI's chat; `text.format` of responses has its schema at the same level.

    Raises
    ------
    ApiError
    """
    if wanted is None:
        return None
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise bad_request(f"response_format of type {kind!r} is not supported", param="response_format")
    inner = wanted.get(schema_key) if schema_key and kind == "json_schema" else None
    described = inner if isinstance(inner, dict) else wanted
    unknown = sorted(
        (wanted.keys() | described.keys()) - {"type", "schema", schema_key, "name", "description", "strict"}
    )
    if unknown:
        raise bad_request(f"response_format.{unknown[0]} is not supported", param="response_format")
    if kind == "text":
        return None
    schema = described.get("schema", {"type": "object"} if kind == "json_object" else None)
    if not isinstance(schema, dict):
        raise bad_request("response_format has no schema that is an object", param="response_format")
    with _told("response_format"):
        return json_form(schema)


def sampled_form(request: Sampled) -> Form | None:
    """`grammar` and `json_schema`, which llama-server takes beside OpenAI's.

    Raises
    ------
    ApiError
    """
    if request.grammar and request.json_schema is not None:
        raise bad_request("grammar and json_schema were both given", param="grammar")
    if request.json_schema is not None:
        with _told("json_schema"):
            return json_form(request.json_schema)
    with _told("grammar"):
        return grammar_form(request.grammar) if request.grammar else None


@contextmanager
def _told(param: str) -> Iterator[None]:
    """What is wrong with a grammar becomes an answer to the client."""
    try:
        yield
    except ApiError:
        raise
    except UsageError as error:
        hint = f" ({error.hint})" if error.hint else ""
        raise bad_request(error.message + hint, param=param) from None


# ---- grammars ----


def one_form(forms: Iterable[Form | None]) -> Form | None:
    """The one that was asked for.

    Raises
    ------
    ApiError
        There are several.
    """
    found = [form for form in forms if form is not None]
    if len(found) > 1:
        raise bad_request("response_format, json_schema and grammar exclude each other", param="response_format")
    return found[0] if found else None


def constrained(choosing: Choosing, prompts: Prompts, form: Form | None, *, ignore_eos: bool = False) -> Choosing:
    """A choice of tokens that keeps to a form from its first token on."""
    if form is None:
        return choosing
    if ignore_eos:
        raise bad_request("ignore_eos and a grammar, whose end is one, exclude each other", param="ignore_eos")
    with _told("grammar"):
        return replace(choosing, grammar=prompts.grammars.compiled(form))


def chat_constrained(
    choosing: Choosing,
    prompts: Prompts,
    prompt: ChatPrompt,
    tools: Tools | None,
    form: Form | None,
    *,
    ignore_eos: bool = False,
) -> Choosing:
    """A choice of tokens that keeps to a form, or to how functions are called, after the thoughts."""
    if form is not None and form.grammars and tools is not None and tools.choice != "none":
        raise bad_request("a grammar and tools exclude each other", param="grammar")
    if tools is None or (tools.choice == "none" and form is not None):
        found, thoughts = form, prompts.thoughts
        return constrained(choosing, prompts, _thinking(found, thoughts, prompt), ignore_eos=ignore_eos)
    known = prompts.tool_format
    assert known is not None  # else `call_reading` has refused them
    is_needed = tools.choice == "required" or (not tools.is_parallel and tools.choice != "none") or form is not None
    if is_needed:
        with _told("tools"):
            check_package()
    with _told("tools"):
        found, thoughts = _call_form(known, tools, form, prompts)
    found = _thinking(found, thoughts, prompt)
    if is_needed:
        return constrained(choosing, prompts, found, ignore_eos=ignore_eos)
    return choosing if ignore_eos else _if_possible(choosing, prompts, found)


def _call_form(
    known: ToolFormat, tools: Tools, form: Form | None, prompts: Prompts
) -> tuple[Form | None, Thoughts | None]:
    if tools.choice == "none":
        return must_not_call(known), prompts.thoughts
    calls, thoughts = must_call(known, tools.callable, is_parallel=tools.is_parallel)
    if tools.choice == "required":
        return calls, thoughts or prompts.thoughts
    if form is None:
        return may_call(known, tools.callable, is_parallel=tools.is_parallel), prompts.thoughts
    if known is HARMONY:
        raise UsageError("this model can't be held to a schema while it may call functions")
    return Form(f"{calls.rule} | answer", f"answer: {form.rule}\n{calls.rules}"), prompts.thoughts


def _thinking(form: Form | None, thoughts: Thoughts | None, prompt: ChatPrompt) -> Form | None:
    return None if form is None else with_thoughts(form, thoughts, prompt.text, has_begun=prompt.is_thinking)


def _if_possible(choosing: Choosing, prompts: Prompts, form: Form | None) -> Choosing:
    """Calls that are made of the model's own accord are held to their schemas where these can be told."""
    try:
        return choosing if form is None else replace(choosing, grammar=prompts.grammars.compiled(form))
    except UsageError:
        return choosing


def call_reading(prompts: Prompts, tools: Tools | None, *, splits_thoughts: bool) -> CallReading | None:
    """How to find calls.

    Raises
    ------
    ApiError
        The model's template knows no tools, or not in a way that can be read.
    """
    if tools is None:
        return None
    if prompts.tool_format is None:
        raise bad_request("the model's chat template teaches no way to call tools that is known", param="tools")
    if tools.choice == "none":
        return None
    if prompts.thoughts is not None and not splits_thoughts:
        raise bad_request("tools need thoughts told from text: reasoning_format is none", param="reasoning_format")
    return CallReading(
        prompts.tool_format, {function.name: function.schema for function in tools.functions}, prompts.sampled
    )
