"""Chat templates: what they are given, and what a hostile one can't do."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fomoe_io.errors import FormatError
from fomoe_io.text import chat
from fomoe_io.text.chat import ChatTemplate

HI = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, Any]] = HI, **options: Any) -> str:
    return ChatTemplate(source).render(messages, **options)


def test_an_ordinary_template() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = ChatTemplate(source, bos_text="<s>")
    for text in ("hi", "naïve 北京 🙂 \r\n", "x" * 3_000_000, "\ud800"):
        expected = f"<s><|im_start|>user\n{text.strip()}<|im_end|>\n<|im_start|>assistant\n"
        assert template.render([{"role": "user", "content": f" {text} "}]) == expected


TALK: list[dict[str, Any]] = [
    *HI,
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "é", "b": [1]}}}],
    },
    {"role": "tool", "content": "dry", "tool_call_id": "1"},
]


@pytest.mark.parametrize(
    ("written", "want"),
    [
        ("{% for key, value in call.arguments.items() %}<{{ key }}>{{ value }}{% endfor %}", "<a>é<b>[1]"),
        ("{{ call.arguments | tojson }}", '{"a": "é", "b": [1]}'),
        ("{{ '{' + call.arguments + '}' }}", '{{"a": "é", "b": [1]}}'),
        ("{{ call.arguments }}", '{"a": "é", "b": [1]}'),
        (
            "{% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}",
            '{"a": "é", "b": [1]}',
        ),
    ],
)
def test_arguments_of_calls_are_what_the_template_wants(written: str, want: str) -> None:
    source = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{% set call = c.function %}"
    template = ChatTemplate(source + written + "{% endfor %}{% endfor %}")
    for _ in range(2):
        assert template.render(TALK) == f"hi{want}dry"
    plain = [*HI, {"role": "assistant", "content": "so"}]
    assert template.render(plain) == "hiso"


def test_thoughts_of_a_call_under_the_name_that_gpt_oss_has() -> None:
    source = "{% for message in messages %}[{{ message.thinking }}]{{ message.content }}{% endfor %}"
    assert render(source, TALK) == "[]hi[hm][]dry"
    talk = [*HI, {**TALK[1], "content": "I look."}]
    assert render(source, talk) == "[]hi[]I look."


def test_thinking() -> None:
    source = "{{ messages[0].content }}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    assert [render(source, enable_thinking=value) for value in (None, True, False)] == ["hi", "hiTrue", "hiFalse"]


def test_generation_marks_are_inert() -> None:
    source = "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}{% endfor %}"
    assert render(source) == "hi"


def test_tools_and_documents_are_none() -> None:
    source = (
        "{% if tools is not none or documents is not none %}{{ tools | length }}{% endif %}{{ messages[0].content }}"
    )
    assert render(source) == "hi"


@pytest.mark.parametrize(
    "content",
    ["{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
     "{% for part in m.content %}{{ part['text'] + '' }}{% endfor %}", "{{ m.content[0].text + '' }}"],
)  # fmt: skip
def test_templates_that_take_parts_get_them(content: str) -> None:
    """A text is left out by the first, and fails in the others."""
    source = "{% for m in messages %}[{{ m.role }}] " + content + "{{ '\n' }}{% endfor %}"
    messages = [{"role": "system", "content": "be brief"}, *HI]
    assert render(source, messages) == "[system] be brief\n[user] hi\n"


def test_templates_that_take_both_get_texts() -> None:
    source = "{{ messages[0].content if messages[0].content is string else 'parts' }}"
    assert render(source) == "hi"


def test_json_is_written_as_asked() -> None:
    source = (
        "{{ {'b': '<é>', 'a': [1]} | tojson }}{{ [1, 2] | tojson(separators=(',', ':')) }}{{ messages[0].content }}"
    )
    assert render(source) == '{"b": "<é>", "a": [1]}[1,2]hi'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only\nusers') }}", "refuses the conversation: only users"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages[0].nothing.more }}", "no attribute"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ {}['a' + 1] }}", "TypeError"),
        ("{{ 'a'.index('b') }}", "ValueError"),
        ("{{ '%d' % 'x' }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_failures_are_one_line(source: str, message: str) -> None:
    with pytest.raises(FormatError, match=message) as error:
        render(source)
    assert error.value.hint == "--raw" and "\n" not in error.value.message


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ 'a", "{% if 1 %}", "{{ " + "(" * 5000 + " }}", "{{ x | no_such }}"]
)
def test_damaged_templates(source: str) -> None:
    with pytest.raises(FormatError, match="is damaged") as error:
        ChatTemplate(source)
    assert "\n" not in error.value.message


@pytest.mark.parametrize("value", [7, True, 0.5, ["x"], {"x": 1}])
def test_a_template_of_another_type(value: Any) -> None:
    with pytest.raises(FormatError, match="expected a text"):
        ChatTemplate.from_metadata({chat.TEMPLATE_KEY: value}, bos_text="", eos_text="")


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ ['a'] * 10**10 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{% set ns = namespace(x='ab') %}{% for _ in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for _ in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{{ ('a' * 1000000).replace('a', 'a' * 1000000) }}",
        "{% for _ in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
        "{{ range(10**9) | list }}",
        "{{ lipsum(n=1000000) }}",
    ],
)
def test_what_builds_gigabytes_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MOST_SECONDS", 3.0)
    started = time.monotonic()
    with pytest.raises(FormatError) as error:
        render(source)
    assert time.monotonic() - started < 30 and "\n" not in error.value.message


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 9 ** (9 ** 9) }}",
    ],
)
def test_what_runs_for_minutes_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MOST_SECONDS", 0.5)
    with pytest.raises(FormatError, match=r"takes more than 0.5 s"):
        render(source)


def test_a_template_goes_on_after_a_run_that_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate("{% if messages[0].content == 'loop' %}" + loop + "{% endif %}{{ messages[0].content }}")
    assert template.render(HI) == "hi"
    monkeypatch.setattr(chat, "MOST_SECONDS", 0.5)
    with pytest.raises(FormatError, match="takes more than"):
        template.render([{"role": "user", "content": "loop"}])
    monkeypatch.undo()
    assert template.render(HI) == "hi"


def test_an_interrupt_ends_a_run() -> None:
    template = ChatTemplate("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    started = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        template.render(HI)
    assert time.monotonic() - started < chat.MOST_SECONDS / 2


def test_threads_may_share_a_template() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    texts = [str(i) * 50_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: template.render([{"role": "user", "content": text}]), texts)) == texts


def test_no_process_is_left() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    assert template._worker is not None
    process = template._worker._process.pid
    assert Path(f"/proc/{process}").exists()
    del template
    gc.collect()
    assert not Path(f"/proc/{process}").exists()


def test_a_template_may_keep_a_list() -> None:
    """Of one question: the next begins anew."""
    source = "{% set seen = [] %}{% for m in messages %}{% set _ = seen.append(m.role) %}{% endfor %}{{ seen | join }}"
    template = ChatTemplate(source)
    assert [template.render(TALK) for _ in range(2)] == ["userassistanttool"] * 2
