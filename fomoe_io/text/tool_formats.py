"""How models write calls of functions: one entry of a table for each way that a chat template may teach."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fomoe_io.text.grammar import Form, after_thoughts, json_rule, quoted


class Function(NamedTuple):
    """One that the model may call; a strict one is called as its schema says, or refused."""

    name: str
    schema: Mapping[str, Any]
    is_strict: bool = False


class Thoughts(NamedTuple):
    """What stands around thoughts, and before what is not one."""

    begin: str
    end: str
    plain: str = ""


THINK = Thoughts("<think>", "</think>")
ANALYSIS = Thoughts("<|channel|>analysis<|message|>", "<|end|><|start|>assistant", "<|channel|>final<|message|>")


_Rule = Callable[[Sequence[Function], bool], tuple[str, str]]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A way to write calls.

    Attributes
    ----------
    name : str
    marks : tuple of str
        All stand in a template that teaches it.
    begin, end : str
        Around a call, or around several.
    head : Pattern
        Of a call: its first group is the function's name.
    parameter : Pattern or None
        What stands before a value: its first group is the key.  None: the arguments are a JSON object.
    value_end : str
    tail : Pattern
        What ends a call, within `begin` and `end`.
    is_padded : bool
        Values are on lines of their own.
    rule : callable
        For functions, and whether there may be several calls: the right-hand side of a rule for what follows `begin`,
        `end` included; and the rules that it refers to.
    """

    name: str
    marks: tuple[str, ...]
    begin: str
    end: str
    head: re.Pattern[str]
    rule: _Rule
    tail: re.Pattern[str]
    parameter: re.Pattern[str] | None = None
    value_end: str = ""
    is_padded: bool = False


# ---- rules ----


def special(name: str) -> str:
    """A token of DeepSeek's."""
    return "<\uff5c" + name.replace(" ", "\u2581") + "\uff5c>"


class _Json(NamedTuple):
    """How a format writes a call whose arguments are JSON; {} stands for the function's name, # for a number."""

    head: str
    end: str = ""

    def rules(self, name: str, function: Function) -> list[str]:
        """Of a call of a function, under a name, and what it refers to."""
        schema = {"type": "object", **function.schema}
        parts = [quoted(part) for part in self.head.replace("{}", function.name).split("#")]
        after = quoted(self.end) if self.end else ""
        return [
            f"{name}: {' /[0-9]+/ '.join(parts)} {name}_arguments {after}",
            f"{name}_arguments: {json_rule(schema, is_lenient=not function.is_strict)}",
        ]


class _Tags(NamedTuple):
    """How a format of tags writes things; {} stands for a name.  A loose one may leave out ends of lines."""

    function: str
    parameter: str
    value_end: str
    function_end: str
    is_loose: bool = False

    def _literal(self, text: str) -> str:
        if not self.is_loose:
            return quoted(text)
        return ' "\\n"? '.join(quoted(part) if part else "" for part in text.split("\n"))

    def rules(self, name: str, function: Function) -> list[str]:
        """Of a call of a function, under a name, and what it refers to.

        Parameters come in the schema's order, those that are not required as the model likes.
        """
        properties, required = function.schema.get("properties") or {}, function.schema.get("required") or ()
        parts, rules = [], []
        for number, (key, schema) in enumerate(properties.items()):
            rule = f"{name}_{number}"
            parts.append(rule if key in required else f"{rule}?")
            rules.append(f"{rule}: {self._literal(self.parameter.format(key))} {self._value(schema, function)}")
        if not properties and function.schema.get("additionalProperties") is not False:
            before, _, after = self.parameter.partition("{}")
            parts.append(f"{name}_any*")
            rules.append(f"{name}_any: {self._literal(before)} /[A-Za-z0-9_-]+/ {self._literal(after)} value")
        head, end = self._literal(self.function.format(function.name)), self._literal(self.function_end)
        return [f"{name}: {head} {' '.join(parts)} {end}", *rules]

    def _value(self, schema: Any, function: Function) -> str:
        end = quoted(self.value_end)
        if not is_text(schema):
            definitions = {key: function.schema[key] for key in ("$defs", "definitions") if key in function.schema}
            inner = {**(schema if isinstance(schema, Mapping) else {}), **definitions}
            return f"{json_rule(inner, is_lenient=not function.is_strict)} {end}"
        if "enum" not in schema:
            return "value"
        return f"({' | '.join(quoted(str(text)) for text in schema['enum'])}) {end}"


def _calls(form: _Json | _Tags, section: str = "call") -> _Rule:
    """The rule of a format: `section` stands after its beginning, with {calls} where one section may have several."""

    def rule(functions: Sequence[Function], is_parallel: bool) -> tuple[str, str]:
        names = [f"call_{number}" for number in range(len(functions))]
        found = [f"call: {' | '.join(names)}"]
        for name, function in zip(names, functions, strict=True):
            found += form.rules(name, function)
        if isinstance(form, _Tags):
            found.append(f"value[lazy]: /(.|\\n)*/ {quoted(form.value_end)}")
        calls = 'call ("\\n"? call)*' if is_parallel else "call"
        return section.replace("{calls}", calls), "\n".join(found) + "\n"

    return rule


def is_text(schema: Any) -> bool:
    """Whether a value of this schema is a text, which formats of tags write as it is."""
    if not isinstance(schema, Mapping):
        return False
    if "enum" in schema:
        return bool(schema["enum"]) and all(isinstance(value, str) for value in schema["enum"])
    return schema.get("type") == "string"


# ---- the table ----

HARMONY = ToolFormat(
    name="harmony",
    marks=("<|channel|>", "commentary"),
    begin="<|channel|>commentary to=",
    end="<|call|>",
    head=re.compile(r"to=(?:functions\.)?([\w.-]+)"),
    rule=_calls(_Json("functions.{} <|constrain|>json<|message|>")),
    tail=re.compile(r"<\|call\|>"),
)
"""Of gpt-oss, whose answers have channels: read by a parser of its own."""


def _deepseek(name: str, before: str, after: str, end: str, *marks: str) -> ToolFormat:
    call = re.escape(special("tool call begin") + before)
    return ToolFormat(
        name=name,
        marks=(special("tool calls begin"), special("tool sep"), *marks),
        begin=special("tool calls begin"),
        end=special("tool calls end"),
        head=re.compile(rf"[^{{]*?{call}([^<\s]+){re.escape(after)}\s*(?=\{{)"),
        tail=re.compile(re.escape(end + special("tool call end"))),
        rule=_calls(
            _Json(special("tool call begin") + before + "{}" + after, end + special("tool call end")),
            f"{{calls}} {quoted(special('tool calls end'))}",
        ),
    )


FORMATS = (
    HARMONY,
    ToolFormat(
        name="minimax-m2",
        marks=("<minimax:tool_call>", "<invoke name="),
        begin="<minimax:tool_call>",
        end="</minimax:tool_call>",
        head=re.compile(r'\s*<invoke name="?([^">\n]+)"?>'),
        parameter=re.compile(r'\s*<parameter name="?([^">\n]+)"?>'),
        value_end="</parameter>",
        tail=re.compile(r"\s*</invoke>"),
        rule=_calls(
            _Tags('<invoke name="{}">\n', '<parameter name="{}">', "</parameter>\n", "</invoke>\n"),
            r'"\n" {calls} "</minimax:tool_call>"',
        ),
    ),
    ToolFormat(
        name="glm-4.5",
        marks=("<tool_call>", "<arg_key>"),
        begin="<tool_call>",
        end="</tool_call>",
        head=re.compile(r"\s*([^\s<]+)(?=[\s<])"),
        parameter=re.compile(r"\s*<arg_key>([^<]+)</arg_key>\s*<arg_value>"),
        value_end="</arg_value>",
        tail=re.compile(r"(?=\s*</tool_call>)"),
        rule=_calls(  # GLM-4.7 leaves the ends of lines out
            _Tags("{}", "\n<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>", "\n</tool_call>", is_loose=True)
        ),
    ),
    ToolFormat(
        name="qwen3-coder",
        marks=("<tool_call>", "<function=", "<parameter="),
        begin="<tool_call>",
        end="</tool_call>",
        head=re.compile(r"\s*<function=([^>\n]+)>"),
        parameter=re.compile(r"\s*<parameter=([^>\n]+)>"),
        value_end="</parameter>",
        tail=re.compile(r"\s*</function>"),
        is_padded=True,
        rule=_calls(
            _Tags("<function={}>\n", "<parameter={}>\n", "\n</parameter>\n", "</function>\n"),
            r'"\n" call "</tool_call>"',
        ),
    ),
    ToolFormat(
        name="kimi-k2",
        marks=("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"),
        begin="<|tool_calls_section_begin|>",
        end="<|tool_calls_section_end|>",
        head=re.compile(
            r"[^{]*?<\|tool_call_begin\|>\s*(?:functions\.)?([^\s<]+?)(?::\d+)?\s*"
            r"<\|tool_call_argument_begin\|>\s*(?=\{)"
        ),
        tail=re.compile(r"\s*<\|tool_call_end\|>"),
        rule=_calls(
            _Json("<|tool_call_begin|>functions.{}:#<|tool_call_argument_begin|>", "<|tool_call_end|>"),
            '{calls} "<|tool_calls_section_end|>"',
        ),
    ),
    _deepseek("deepseek-v3", "function" + special("tool sep"), "\n```json\n", "\n```", "```json"),
    _deepseek("deepseek-v3.1", "", special("tool sep"), ""),
    ToolFormat(
        name="hermes",
        marks=("<tool_call>", "arguments"),
        begin="<tool_call>",
        end="</tool_call>",
        head=re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'),
        tail=re.compile(r"\s*\}?"),
        rule=_calls(_Json('{"name": "{}", "arguments": ', "}"), r'"\n" call "\n</tool_call>"'),
    ),
)  # fmt: skip
"""The first whose marks a template has is its format."""


def tool_format(template: str) -> ToolFormat | None:
    """The way that a chat template teaches; None where it knows no tools, or is not in the table."""
    if "tools" not in template:
        return None
    return next((known for known in FORMATS if all(mark in template for mark in known.marks)), None)


def thoughts_of(template: str) -> Thoughts | None:
    """How a model with this template thinks, if it does."""
    if "<|channel|>" in template and "analysis" in template:
        return ANALYSIS
    return THINK if THINK.end in template else None


# ---- whole answers ----


def with_thoughts(form: Form, thoughts: Thoughts | None, prompt: str, *, has_begun: bool) -> Form:
    """The form after the thoughts that may come after a prompt, or that have begun at its end."""
    if thoughts is None or prompt.rstrip().endswith(thoughts.end):
        return form
    return after_thoughts(form, thoughts.begin, thoughts.end, plain=thoughts.plain, has_begun=has_begun)


def must_call(known: ToolFormat, functions: Sequence[Function], *, is_parallel: bool) -> tuple[Form, Thoughts | None]:
    """The form of an answer that calls; and what stands around its thoughts where that is not as usual."""
    rule, rules = known.rule(functions, is_parallel)
    if known is HARMONY:
        return Form(rule, rules), ANALYSIS._replace(plain=known.begin)
    more = f"(BETWEEN {quoted(known.begin)} section)*" if is_parallel else ""
    rules = f"section: {rule}\nBETWEEN: /\\n{{0,2}}/\n{rules}"
    return Form(f"{quoted(known.begin)} section {more}", rules), None


def may_call(known: ToolFormat, functions: Sequence[Function], *, is_parallel: bool) -> Form | None:
    """The form of an answer whose calls, if it has any, are well-formed; None where that can't be told beforehand."""
    if known is HARMONY:
        return None
    rule, rules = known.rule(functions, is_parallel)
    rules = (
        f"trigger[lazy]: /(.|\\n)*/ {quoted(known.begin)}\nTEXT: /(.|\\n)*/\nAFTER: /[ \\n]*/\nsection: {rule}\n{rules}"
    )
    return Form("(trigger section)* TEXT" if is_parallel else "TEXT | trigger section AFTER", rules)


def must_not_call(known: ToolFormat) -> Form | None:
    """The form of an answer without calls."""
    if known is HARMONY:
        return None
    text = "/(.|\\n)*/"
    return Form("TEXT", f"TEXT: {text} & ~/(.|\\n)*{re.escape(known.begin)}(.|\\n)*/\n")
