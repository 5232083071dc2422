"""JSON documents, text and templates, changed."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    255,
    4096,
    1 << 31,
    1 << 53,
    1 << 63,
    10**30,
    0.5,
    -0.0,
    1e308,
    "",
    "a",
    "../../etc",
    "\x1b[2J",
    "0" * 16,
    "ü",
    "1e9",
    [],
    [0],
    [1, [2]],
    [[1], [2, 3]],
    {},
    {"a": 1},
    ["a"],
    [None],
    [0.5] * 8,
    [[]],
)


def _places(node: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            found.append((node, key))
            _places(child, found)
    return found


def mutated_json(r: random.Random, document: Any) -> Any:
    """A copy of a document with one to three of its values replaced, left out, doubled or exchanged."""
    document = copy.deepcopy(document)
    for _ in range(r.choice([1, 1, 2, 3])):
        places = _places(document, [])
        if not places:
            return r.choice(VALUES)
        # containers are few beside the numbers in long lists: half of the changes are theirs
        named = [place for place in places if isinstance(place[0], dict)]
        node, key = r.choice(named if named and r.random() < 0.5 else places)
        value, what = node[key], r.randrange(6)
        if what == 0 and isinstance(node, dict):
            del node[key]
        elif what == 1 and isinstance(value, list) and value:
            node[key] = value[: r.randrange(len(value))] if r.random() < 0.5 else value + value[:1]
        elif what == 2 and isinstance(value, int | float) and not isinstance(value, bool):
            node[key] = r.choice([value + 1, value - 1, -value, value * 2, value + 4096, value - 4096, value + 0.5])
        elif what == 3:
            other, place = r.choice(places)
            try:
                node[key] = copy.deepcopy(other[place])
            except (KeyError, IndexError):  # it has gone
                node[key] = None
        elif what == 4 and isinstance(node, dict):
            node[str(key) + r.choice(["", " ", "x"])] = r.choice(VALUES)
        else:
            node[key] = r.choice(VALUES)
    return document


WORDS = (
    "",
    "-1",
    "0",
    "7",
    "255",
    "65536",
    "1e9",
    "1e400",
    "nan",
    "inf",
    "9" * 30,
    "0x10",
    "x",
    "\0",
    "ü",
    "1k",
    "[",
    "=",
    ",",
)


def other_numbers(r: random.Random, text: str) -> str:
    """A text with one to three of its words or numbers, or a line, replaced."""
    for _ in range(r.choice([1, 1, 2, 3])):
        if r.random() < 0.2:
            lines = text.split("\n")
            at = r.randrange(len(lines))
            lines[at : at + r.choice([0, 1])] = [r.choice(lines)] * r.choice([0, 1, 2])
            text = "\n".join(lines)
            continue
        places = list(re.finditer(r"[0-9]+|[a-z_]+", text))
        if places:
            place = r.choice(places)
            text = text[: place.start()] + r.choice(WORDS) + text[place.end() :]
    return text


TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{%- set ns = namespace(last=messages|length - 1) %}{%- for m in messages[::-1] %}{%- set i = loop.index0 %}"
    "{%- if m['role'] == 'user' and ns.last > 0 %}{%- set ns.last = i %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{% for m in messages %}{{ m.content|trim }}{{ eos_token }}{% endfor %}",
    "{% macro text(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{{ p.text }}{% endfor %}{% endif %}"
    "{% endmacro %}{% for m in messages %}{{ text(m.content) }}{% if not loop.last %}\n{% endif %}{% endfor %}",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ messages[0].content.split('x')[-1].lstrip('\\n') }}{{ strftime_now('%d %b %Y') }}{{ messages|tojson }}",
)
HOSTILE = (
    "{{ 'a' * 10**10 }}",
    "{{ [1] * 10**9 }}",
    "{{ range(10**9)|list }}",
    "{{ 10**10**8 }}",
    "{{ 'a'.rjust(10**10) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ lipsum(n=10**7) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ messages.__class__ }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ strftime_now(1) }}",
    "{{ strftime_now('%' * 100000) }}",
    "{{ strftime_now('\\ud800') }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ messages|batch(0)|list }}",
    "{{ messages|slice(0)|list }}",
    "{{ 1 / 0 }}",
    "{{ messages[99].content }}",
    "{{ messages|sort|first }}",
    "{{ none + 1 }}",
    "{{ x.y.z }}",
    "{{ [].pop() }}",
    "{{ {}['a'] }}",
    "{{ 'x'|int(base=99) }}",
    "{{ 'a'.encode('nope') }}",
    "{{ raise_exception() }}",
    "{{ raise_exception(1, 2) }}",
    "{{ messages|map(attribute='a.b')|list }}",
    "{{ messages|sum }}",
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ '(' * 5000 }}",
    "(" * 5000,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "-" * 50000 + "1 }}",
    "{% if 1 %}" * 500,
    "{% for x in messages %}{% break %}{% endfor %}{% continue %}",
    "{{ '\\x1b[2J' }}",
    "{{ '\\ud800' }}",
    "{% set x = messages %}{% for i in range(40) %}{% set x = x + x %}{% endfor %}{{ x }}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{{ joiner.__call__() }}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a'|indent(10**9) }}",
    "{{ 'a '*9999|wordwrap(1) }}",
    "{{ messages|pprint }}",
    "{{ 9**9**9 }}",
    "{{ 'a'.join([messages|string] * 10**7) }}",
    "{{ -1 << 10**10 }}",
    "{{ 'a'|replace('', 'a' * 10**5)|replace('a', 'a' * 10**5) }}",
    "{{ dict(a=1).update({}) }}",
    "{{ 'é'.encode('ascii') }}",
)
_PIECES = (
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "-%}",
    "{%-",
    " for ",
    " in ",
    " if ",
    " else ",
    "endfor",
    "endif",
    "messages",
    "m.role",
    "loop.index",
    "|",
    "[0]",
    "[::-1]",
    "(",
    ")",
    "'",
    "\\",
    " + ",
    " * ",
    " ** ",
    "set x = ",
    "macro f()",
    "is string",
    "~",
    "\0",
    "ü",
    "namespace(a=1)",
    "range(9)",
    "raise_exception('x')",
    "not ",
    "none",
    ".x",
)


def mutated_template(r: random.Random, number: int) -> str:
    """The hostile ones first, then pieces of ordinary ones put together wrongly."""
    if number < len(HOSTILE):
        return HOSTILE[number]
    text = r.choice([*TEMPLATES, *TEMPLATES, r.choice(HOSTILE)])
    for _ in range(r.choice([1, 1, 2, 4])):
        at = r.randrange(len(text) + 1)
        end = min(len(text), at + r.choice([0, 0, 1, 3, 10]))
        text = text[:at] + r.choice([*_PIECES, "", text[end : end + 20]]) + text[end:]
    return text
