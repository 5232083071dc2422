"""Grammars: what may come next, in which syntaxes, and what is wrong with those that can't be followed."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import numpy as np
import pytest

from fomoe_io.errors import UsageError
from fomoe_io.text import grammar
from fomoe_io.text.grammar import Form, Grammars, after_thoughts, grammar_form, json_form
from fomoe_io.text.sampler import Sampler, SamplingConfig
from fomoe_io.text.tokenizer import Tokenizer
from tests.tiny_model import vocabulary

llguidance = pytest.importorskip("llguidance")

VOCABULARY = 310  # more logits than tokens, as some models have


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokens, types, merges = vocabulary(300)
    for place, text in enumerate(("<think>", "</think>", "<tool_call>")):
        tokens[260 + place], types[260 + place] = text, 4
    end = tokens.index("<|endoftext|>")
    return Tokenizer(tokens, merges, types, pre="gpt-2", bos_id=None, add_bos=False, named={"eos": end})


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCABULARY)


def follows(grammars: Grammars, tokenizer: Tokenizer, form: Form, text: str) -> tuple[int, bool]:
    """How many characters may come, and whether the answer may end after them."""
    constraint = grammars.compiled(form).start()
    tokens = tokenizer.encode(text)
    for place, token in enumerate(tokens):
        if constraint.masked(np.zeros(VOCABULARY, np.float32))[token] != 0:
            return len(tokenizer.decode(tokens[:place])), False
        constraint.advance(token)
    end = next(iter(tokenizer.eog_ids))
    return len(text), bool(constraint.masked(np.zeros(VOCABULARY, np.float32))[end] == 0)


def drawn(grammars: Grammars, tokenizer: Tokenizer, form: Form, **sampling: Any) -> str:
    """What chance writes within a form."""
    random = np.random.default_rng(5)
    sampler = Sampler(SamplingConfig(**{"seed": 1, "temperature": 1.0, **sampling}), grammars.compiled(form).start())
    tokens: list[int] = []
    while not sampler.is_over and len(tokens) < 400:
        token = sampler.sample(random.standard_normal(VOCABULARY).astype(np.float32) * 3)
        if token in tokenizer.eog_ids:
            break
        tokens.append(token)
    return tokenizer.decode(tokens)


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "many": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "many"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('{"kind": "cat", "many": 7}', (26, True)),
        ('{\n  "kind":"dog","many":12}', (27, True)),
        ('{"kind": "cow"', (11, False)),
        ('{"kind": "cat"}', (14, False)),
        ('{    "kind"', (2, False)),
        ('{"kind": "cat", "many": 7} ', (26, False)),
        ("hello", (0, False)),
    ],
)
def test_json_schema(grammars: Grammars, tokenizer: Tokenizer, text: str, want: tuple[int, bool]) -> None:
    assert follows(grammars, tokenizer, json_form(SCHEMA), text) == want


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0}, {"top_k": 0, "min_p": 0, "top_p": 1}, {"top_k": 1}, {"repeat_penalty": 100}]
)
def test_what_chance_writes_follows_it(grammars: Grammars, tokenizer: Tokenizer, sampling: dict[str, Any]) -> None:
    found = json.loads(drawn(grammars, tokenizer, json_form(SCHEMA), **sampling))
    assert found["kind"] in ("cat", "dog") and 0 <= found["many"] <= 99


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        ('root ::= "yes" | "no"', "yes", "maybe"),
        ('root ::= item+\nitem ::= "- " [^\\n]+ "\\n"  # a list\n', "- a\n- b\n", "* a"),
        ('root ::= [0-9]{3} ("-" [a-f])?', "123-a", "12-a"),
        ('root ::= "\\x41" "\\u00e9" "\\\\"', "A\u00e9\\", "B"),
        ("start: /[a-z]+/ \"!\"", "abc!", "ABC!"),
    ],
)  # fmt: skip
def test_gbnf(grammars: Grammars, tokenizer: Tokenizer, source: str, good: str, bad: str) -> None:
    form = grammar_form(source)
    assert follows(grammars, tokenizer, form, good) == (len(good), True)
    assert follows(grammars, tokenizer, form, bad)[0] < len(bad)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('root ::= "a" | b', "'b' not found"),
        ("root ::= (", r"Expected '\)'"),
        ("", "No 'root' rule"),
        ("root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "recursion"),
        ("root ::= " + '"a" ' * 20000, "longer than"),
        ("".join(f"r{i} ::= r{i + 1}\n" for i in range(2000)), "longer than"),
    ],
)
def test_a_wrong_grammar(source: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        grammar_form(source)
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "strng"}, "Invalid type: strng"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "https://example.org/schema.json"}, "not present|fetch"),
        ({"$ref": "file:///etc/passwd"}, "not present|fetch"),
        ({"type": "string", "pattern": "("}, "."),
        ({"enum": []}, "."),
    ],
)
def test_a_wrong_schema(grammars: Grammars, schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=f"the grammar is wrong: .*({reason})") as caught:
        grammars.compiled(json_form(schema))
    assert "\n" not in caught.value.message and len(caught.value.message) < 400


@pytest.mark.parametrize("schema", [{"enum": [1 - 2**63]}, {"items": {"const": -(2**63)}}, {"minimum": 1e300}])
def test_numbers_that_end_the_process_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="the number"):
        json_form(schema)


def test_a_lenient_one_leaves_out_what_is_not_built(grammars: Grammars, tokenizer: Tokenizer) -> None:
    form = Form(grammar.json_rule({"type": "array", "uniqueItems": True}, is_lenient=True))
    assert follows(grammars, tokenizer, form, "[1]") == (3, True)


def test_a_grammar_that_grows_is_bounded(grammars: Grammars) -> None:
    for schema in (
        {"type": "string", "pattern": "(a{1000}){1000}"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 100000, "maxItems": 1000000},
    ):
        constraint = grammars.compiled(json_form(schema)).start()
        constraint.masked(np.zeros(VOCABULARY, np.float32))


def test_what_grows_beyond_its_bounds_is_refused(grammars: Grammars) -> None:
    patterns = {f"p{i}": {"type": "string", "pattern": "^[a-z]{1,9}$"} for i in range(5000)}
    with pytest.raises(UsageError, match="characters"):
        grammars.compiled(json_form({"type": "object", "properties": patterns}))
    wide = {f"p{i}": {"type": "string"} for i in range(2000)}
    constraint = grammars.compiled(json_form({"type": "object", "properties": wide})).start()
    with pytest.raises(UsageError, match="can't be followed any further"):
        for _ in range(20):
            constraint.advance(int(constraint.masked(np.zeros(VOCABULARY, np.float32)).argmax()))


def test_one_of_several_is_any_of_them(grammars: Grammars, tokenizer: Tokenizer) -> None:
    form = json_form({"oneOf": [{"type": "boolean"}, {"type": "null"}]})
    assert follows(grammars, tokenizer, form, "true") == follows(grammars, tokenizer, form, "null") == (4, True)


BODY = json_form({"enum": [1, 2]})


@pytest.mark.parametrize(
    ("has_begun", "text", "want"),
    [
        (True, "any <b> thing 1</think>\n\n1", True),
        (True, "1", False),
        (False, "<think>\nso</think>2", True),
        (False, "2", True),
        (False, "so 2", False),
    ],
)
def test_thoughts_are_free(grammars: Grammars, tokenizer: Tokenizer, has_begun: bool, text: str, want: bool) -> None:
    form = after_thoughts(BODY, "<think>", "</think>", has_begun=has_begun)
    assert (follows(grammars, tokenizer, form, text) == (len(text), True)) is want


def test_grammars_of_gbnf_come_after_thoughts_too(grammars: Grammars, tokenizer: Tokenizer) -> None:
    form = after_thoughts(grammar_form('root ::= "a" "b"?'), "<c>x", "<d>", plain="<e>", has_begun=False)
    for text in ("<c>x hm <d><e>ab", "<e>a"):
        assert follows(grammars, tokenizer, form, text) == (len(text), True)


def test_control_tokens_are_no_text(grammars: Grammars, tokenizer: Tokenizer) -> None:
    end = next(iter(tokenizer.eog_ids))
    constraint = grammars.compiled(Form("/(.|\\n)+/")).start()
    may = constraint.masked(np.zeros(VOCABULARY, np.float32)) == 0
    assert not may[end] and not may[300:].any() and may[260:263].all() and may[:94].all()


def test_answers_of_one_grammar_are_apart(grammars: Grammars, tokenizer: Tokenizer) -> None:
    compiled = grammars.compiled(grammar_form('root ::= "abc"'))
    one, other = compiled.start(), compiled.start()
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    one.advance(a)
    assert other.masked(np.zeros(VOCABULARY, np.float32))[a] == 0
    assert one.masked(np.zeros(VOCABULARY, np.float32))[b] == 0


def test_it_is_over_where_nothing_may_come(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.compiled(grammar_form('root ::= "ab"')).start()
    states = []
    for token in tokenizer.encode("ab"):
        states.append(constraint.is_over)
        constraint.advance(token)
    assert [*states, constraint.is_over] == [False, False, True]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    for act in (lambda: grammar_form('root ::= "a"'), lambda: Grammars(tokenizer, VOCABULARY).compiled(BODY)):
        with pytest.raises(UsageError, match="llguidance") as caught:
            act()
        assert caught.value.hint == "pip install 'fomoe_io[grammar]'"


def test_random_json_is_json(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Structures of several kinds, written by chance."""
    leaves: list[dict[str, Any]] = [
        {"type": "boolean"}, {"type": "null"}, {"type": "integer", "minimum": -5, "maximum": 5},
        {"type": "string", "maxLength": 4}, {"enum": ["x", 3, None]}, {"type": "string", "pattern": "^[a-c]{2}$"},
    ]  # fmt: skip
    for one, two in itertools.pairwise(leaves):
        schema = {"type": "array", "items": {"anyOf": [one, two]}, "minItems": 1, "maxItems": 3}
        found = json.loads(drawn(grammars, tokenizer, json_form(schema)))
        assert 1 <= len(found) <= 3
        for value in found:
            fits = [
                isinstance(value, bool), value is None, isinstance(value, int), isinstance(value, str),
            ]  # fmt: skip
            assert any(fits)
    text = drawn(grammars, tokenizer, json_form(leaves[5]))
    assert re.fullmatch('"[a-c]{2}"', text)
