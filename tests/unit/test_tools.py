"""Calls of functions, as each family of models writes them: found however the stream is cut, and never in thoughts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fomoe_io.text.tool_formats import FORMATS, Function, may_call, must_call, must_not_call, special, tool_format
from fomoe_io.text.tool_parser import CallParser, HarmonyParser, Part

PROPERTIES: dict[str, Any] = {
    "path": {"type": "string"},
    "lines": {"type": "integer"},
    "deep": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
    "mode": {"type": "string", "enum": ["r", "w"]},
}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": ["path", "lines"], "additionalProperties": False}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTIONS = [Function("read_file", SCHEMA), Function("now", EMPTY)]
SCHEMAS = {function.name: function.schema for function in FUNCTIONS}
BY_NAME = {known.name: known for known in FORMATS}
BY_NAME["glm-4.7"] = BY_NAME["glm-4.5"]

TRICKY = 'a "b"\n</tool \\ {é}\n'
WANTED = {"path": TRICKY, "lines": 3, "deep": {"a": True}, "mode": "w"}

WRITTEN = {
    "hermes": "<tool_call>\n"
    + json.dumps({"name": "read_file", "arguments": WANTED}, ensure_ascii=False)
    + "\n</tool_call>",
    "qwen3-coder": "<tool_call>\n<function=read_file>\n"
    f"<parameter=path>\n{TRICKY}\n</parameter>\n<parameter=lines>\n3\n</parameter>\n"
    '<parameter=deep>\n{"a": true}\n</parameter>\n<parameter=mode>\nw\n</parameter>\n</function>\n</tool_call>',
    "minimax-m2": '<minimax:tool_call>\n<invoke name="read_file">\n'
    f'<parameter name="path">{TRICKY}</parameter>\n<parameter name="lines">3</parameter>\n'
    '<parameter name="deep">{"a": true}</parameter>\n<parameter name="mode">w</parameter>\n'
    "</invoke>\n</minimax:tool_call>",
    "glm-4.5": f"<tool_call>read_file\n<arg_key>path</arg_key>\n<arg_value>{TRICKY}</arg_value>\n"
    "<arg_key>lines</arg_key>\n<arg_value>3</arg_value>\n"
    '<arg_key>deep</arg_key>\n<arg_value>{"a": true}</arg_value>\n'
    "<arg_key>mode</arg_key>\n<arg_value>w</arg_value>\n</tool_call>",
}
WRITTEN["glm-4.7"] = WRITTEN["glm-4.5"].replace("\n<arg", "<arg").replace(">\n</tool_call", "></tool_call")


def k2(*calls: tuple[str, str]) -> str:
    """Calls of Kimi-K2, with their numbers."""
    parts = [
        f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for number, (name, arguments) in enumerate(calls)
    ]
    return f"<|tool_calls_section_begin|>{''.join(parts)}<|tool_calls_section_end|>"


WRITTEN["kimi-k2"] = k2(("read_file", json.dumps(WANTED, ensure_ascii=False)))
CALLS_BEGIN, CALLS_END = special("tool calls begin"), special("tool calls end")
CALL_BEGIN, CALL_END, SEPARATOR = special("tool call begin"), special("tool call end"), special("tool sep")


def v3(name: str, arguments: str) -> str:
    """Calls of DeepSeek-V3 and R1."""
    return f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}{CALLS_END}"


def v31(name: str, arguments: str) -> str:
    """Of those that came after them."""
    return f"{CALLS_BEGIN}{CALL_BEGIN}{name}{SEPARATOR}{arguments}{CALL_END}{CALLS_END}"


DEEPSEEK = {"deepseek-v3": v3, "deepseek-v3.1": v31}
WRITTEN |= {name: write("read_file", json.dumps(WANTED, ensure_ascii=False)) for name, write in DEEPSEEK.items()}
BARE = {
    "hermes": '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "qwen3-coder": "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "minimax-m2": '<minimax:tool_call>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
    "glm-4.5": "<tool_call>now\n</tool_call>",
    "glm-4.7": "<tool_call>now</tool_call>",
    "kimi-k2": k2(("now", "{}")),
    **{name: write("now", "{}") for name, write in DEEPSEEK.items()},
}


def joined(parts: list[Part]) -> list[tuple[str, str]]:
    """Neighbours of a kind together; each call begins anew."""
    found: list[tuple[str, str]] = []
    for kind, text in parts:
        if found and found[-1][0] == kind != "call":
            found[-1] = (kind, found[-1][1] + text)
        else:
            found.append((kind, text))
    return found


def parsed(parser: CallParser | HarmonyParser, text: str, size: int) -> list[tuple[str, str]]:
    parts = [part for i in range(0, len(text), size) for part in parser.add(text[i : i + size])]
    return joined(parts + parser.finish())


def calls(name: str, text: str, size: int = 1) -> list[tuple[str, str]]:
    return parsed(CallParser(BY_NAME[name], SCHEMAS), text, size)


@pytest.mark.parametrize("size", [1, 2, 5, 17, 10000])
@pytest.mark.parametrize("name", WRITTEN)
def test_calls_are_found_however_the_stream_is_cut(name: str, size: int) -> None:
    text = f"Let me look.\n\n{WRITTEN[name]}\n{BARE[name]}\n"
    (first, *found) = calls(name, text, size)
    assert first == ("text", "Let me look.")
    assert [kind for kind, _ in found] == ["call", "arguments"] * 2
    assert [found[0][1], found[2][1]] == ["read_file", "now"]
    assert json.loads(found[1][1]) == WANTED and json.loads(found[3][1]) == {}


SECTIONS = {
    "minimax-m2": BARE["minimax-m2"].replace("</invoke>\n", '</invoke>\n<invoke name="now">\n</invoke>\n'),
    "kimi-k2": k2(("now", "{}"), ("now", "{}")),
    **{name: BARE[name].replace(CALLS_END, "\n" + BARE[name].removeprefix(CALLS_BEGIN)) for name in DEEPSEEK},
}


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("name", SECTIONS)
def test_several_calls_of_one_section(name: str, size: int) -> None:
    assert calls(name, SECTIONS[name], size) == [("call", "now"), ("arguments", "{}")] * 2


@pytest.mark.parametrize("name", SECTIONS)
def test_one_call_is_one_also_within_a_section(name: str, machine: Any) -> None:
    for make in (may_call, lambda *a, **k: must_call(*a, **k)[0]):
        assert fits(*machine, make(BY_NAME[name], FUNCTIONS, is_parallel=True), SECTIONS[name])
        assert not fits(*machine, make(BY_NAME[name], FUNCTIONS, is_parallel=False), SECTIONS[name])
        assert fits(*machine, make(BY_NAME[name], FUNCTIONS, is_parallel=False), BARE[name])


@pytest.mark.parametrize("name", WRITTEN)
def test_arguments_come_while_they_are_written(name: str) -> None:
    parser = CallParser(BY_NAME[name], SCHEMAS)
    cut = WRITTEN[name].index("</tool \\")
    parts = joined(parser.add(WRITTEN[name][:cut]))
    assert [kind for kind, _ in parts] == ["call", "arguments"] and parts[1][1].startswith('{"path": "a \\"b\\"')


@pytest.mark.parametrize("name", WRITTEN)
def test_a_call_that_is_cut_short_has_no_whole_arguments(name: str) -> None:
    """What runs it must not take it for one that is complete."""
    for cut in range(len(WRITTEN[name]) // 3, WRITTEN[name].index("w", len(WRITTEN[name]) // 3 * 2)):
        found = dict(calls(name, WRITTEN[name][:cut], 7))
        if "arguments" in found:
            with pytest.raises(ValueError, match=r"Expecting|Unterminated|Invalid"):
                json.loads(found["arguments"])


@pytest.mark.parametrize(
    "text",
    [
        "plain text\n\n",
        "a <tool_cal",
        "<tool_call>\nnot a call\n</tool_call>",
        '<tool_call>\n{"nome": "f"}\n</tool_call> and more',
        "<tool_call>",
        "\n",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    for size in (1, 3, 100):
        assert calls("hermes", text, size) == [("text", text)]


@pytest.mark.parametrize(
    "text",
    [
        '{"arguments": {"a": 1}, "name": "f"}',
        '{"name": "f", "arguments": "{\\"a\\": 1}"}',
        '{"name": "f", "parameters": {"a": 1}}',
        '{ "name" : "f" , "arguments":{"a": 1} }',
    ],
)
def test_json_in_other_orders(text: str) -> None:
    for end in ("\n</tool_call>", "</tool_call>", ""):
        assert calls("hermes", f"<tool_call>{text}{end}", 3) == [("call", "f"), ("arguments", '{"a": 1}')]


def test_a_value_by_its_schema() -> None:
    text = "<tool_call><function=f><parameter=a>\n{a: 1}\n</parameter><parameter=b>\n12\n</parameter></function>"
    schemas = {"f": {"properties": {"b": {"type": "string"}}}}
    found = dict(parsed(CallParser(BY_NAME["qwen3-coder"], schemas), text + "</tool_call>", 1))
    assert json.loads(found["arguments"]) == {"a": "{a: 1}", "b": "12"}


# ---- gpt-oss ----

ANALYSIS = "<|channel|>analysis<|message|>hm to=functions.x<|end|>"
CALL = '<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a": 1}'


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "want"),
    [
        (f"{ANALYSIS}<|start|>assistant<|channel|>final<|message|>yes",
         [("thought", "hm to=functions.x"), ("text", "yes")]),
        (f"{ANALYSIS}<|start|>assistant{CALL}",
         [("thought", "hm to=functions.x"), ("call", "now"), ("arguments", '{"a": 1}')]),
        (f"{CALL}<|call|>", [("call", "now"), ("arguments", '{"a": 1}')]),
        (' to=functions.now<|channel|>commentary json<|message|>{}', [("call", "now"), ("arguments", "{}")]),
        (f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{CALL}",
         [("text", "I look."), ("call", "now"), ("arguments", '{"a": 1}')]),
        ("no channels <|en", [("text", "no channels <|en")]),
        ("<|channel|>final<|message|>", []),
    ],
)  # fmt: skip
def test_channels(text: str, want: list[tuple[str, str]], size: int) -> None:
    assert parsed(HarmonyParser(), text, size) == want


# ---- which format, and grammars of it ----


@pytest.mark.parametrize(
    ("template", "want"),
    [
        ("{% if tools %}<tool_call>\n{\"name\": <f>, \"arguments\": <a>}\n</tool_call>", "hermes"),
        ("{% if tools %}<tool_call>\n<function=f>\n<parameter=x>", "qwen3-coder"),
        ("{% if tools %}<tool_call>{name}\n<arg_key>", "glm-4.5"),
        ('{% if tools %}<minimax:tool_call>\n<invoke name="f">', "minimax-m2"),
        ("{% if tools %}<|channel|>commentary to=functions", "harmony"),
        (f"{{% if tools %}}{CALLS_BEGIN}f{SEPARATOR}", "deepseek-v3.1"),
        (f"{{% if tools %}}{CALLS_BEGIN}f{SEPARATOR}```json", "deepseek-v3"),
        ("{% if tools %}<|tool_calls_section_begin|><|tool_call_argument_begin|>", "kimi-k2"),
        ("{% if tools %}[TOOL_CALLS]", None),
        ("{{ messages }}<tool_call>", None),
    ],
)  # fmt: skip
def test_which_format(template: str, want: str | None) -> None:
    found = tool_format(template)
    assert (found.name if found else None) == want


def fits(grammars: Any, tokenizer: Any, form: Any, text: str) -> bool:
    from tests.unit.test_grammar import follows

    return bool(follows(grammars, tokenizer, form, text) == (len(text), True))


@pytest.fixture(scope="module")
def machine() -> Any:
    pytest.importorskip("llguidance")
    from fomoe_io.text.grammar import Grammars
    from fomoe_io.text.tokenizer import Tokenizer
    from tests.tiny_model import vocabulary
    from tests.unit.test_grammar import VOCABULARY

    tokens, types, merges = vocabulary(300)
    named = {"eos": tokens.index("<|endoftext|>")}
    tokenizer = Tokenizer(tokens, merges, types, pre="gpt-2", bos_id=None, add_bos=False, named=named)
    return Grammars(tokenizer, VOCABULARY), tokenizer


@pytest.mark.parametrize("name", WRITTEN)
def test_what_models_write_fits_the_grammar(name: str, machine: Any) -> None:
    known, one, both = BY_NAME[name], WRITTEN[name], f"{WRITTEN[name]}\n{BARE[name]}"
    for form in (must_call(known, FUNCTIONS, is_parallel=True)[0], may_call(known, FUNCTIONS, is_parallel=True)):
        assert fits(*machine, form, one) and fits(*machine, form, both)
        assert not fits(*machine, form, one.replace("read_file", "write_file"))
        assert not fits(*machine, form, one.replace("lines", "line"))
    alone = must_call(known, FUNCTIONS, is_parallel=False)[0]
    assert fits(*machine, alone, one) and not fits(*machine, alone, both) and not fits(*machine, alone, "hello")
    free = may_call(known, FUNCTIONS, is_parallel=False)
    assert fits(*machine, free, f"I look.\n{one}") and fits(*machine, free, "hello <b>")
    assert not fits(*machine, free, both)
    silent = must_not_call(known)
    assert fits(*machine, silent, f"hello {known.begin[:-1]}") and not fits(*machine, silent, one)


def test_what_gpt_oss_writes_fits_the_grammar(machine: Any) -> None:
    from fomoe_io.text.grammar import after_thoughts

    known = BY_NAME["harmony"]
    form, thoughts = must_call(known, FUNCTIONS, is_parallel=False)
    assert thoughts is not None
    form = after_thoughts(form, thoughts.begin, thoughts.end, plain=thoughts.plain, has_begun=False)
    call = CALL.replace('{"a": 1}', "{}")
    assert fits(*machine, form, call) and fits(*machine, form, f"{ANALYSIS}<|start|>assistant{call}")
    assert not fits(*machine, form, "<|channel|>final<|message|>no")
    assert may_call(known, FUNCTIONS, is_parallel=True) is None


@pytest.mark.parametrize("name", WRITTEN)
def test_what_chance_writes_is_a_call(name: str, machine: Any) -> None:
    from tests.unit.test_grammar import drawn

    function = Function("f", {"type": "object", "properties": {
        "a": {"enum": ["x", "y"]}, "b": {"type": "integer", "minimum": 0, "maximum": 9}, "c": {"type": "boolean"},
    }, "required": ["a", "b"], "additionalProperties": False})  # fmt: skip
    text = drawn(*machine, must_call(BY_NAME[name], [function], is_parallel=False)[0])
    found = parsed(CallParser(BY_NAME[name], {"f": function.schema}), text, 5)
    assert [kind for kind, _ in found] == ["call", "arguments"], text
    values = json.loads(found[1][1])
    assert values["a"] in ("x", "y") and 0 <= values["b"] <= 9 and isinstance(values.get("c", True), bool)
