"""Runs one chat template, as a program of its own: a template is code out of a file, and may loop or build gigabytes.

Jinja's sandbox keeps it from the system but bounds neither time nor memory: a single operation (a repetition, a format
width, a join, a nested list) can take all there is without a place to check.  So the kernel bounds the memory of this
process, and :class:`fomoe_io.text.chat.ChatTemplate`, which starts it, its time.

Lines of JSON on stdin, each answered by one on stdout: {"source": TEXT} -> {"text": ""}, then {"values": {...}} ->
{"text": RENDERED}; {"error": WHY} where it fails.  Imports nothing of the package: it has to start fast.
"""

from __future__ import annotations

import datetime
import json
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment

MEMORY_BYTES = 512 << 20
"""Beyond what the process holds at its start."""
MOST_CHARACTERS = 16 << 20
"""Of a rendered text: several times the longest contexts."""
MOST_REASON_CHARACTERS = 300
LONGEST_SECONDS = 60
"""When whoever asked is gone and can't end this process."""


class _Refusal(jinja2.TemplateError):
    """Of a template that calls raise_exception."""


def _refuse(message: str) -> NoReturn:
    raise _Refusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter, leaves <, > and & alone, as the templates' authors expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """{% generation %} marks what a trainer learns from; the text inside stays."""

    tags = frozenset(("generation",))  # type: ignore[assignment]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compiled(source: str) -> jinja2.Template:
    # not the immutable one: Kimi-K2's template keeps a list, and all values are of one question
    environment = SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _rendered(template: jinja2.Template, values: dict[str, Any]) -> str:
    pieces, count = [], 0
    for piece in template.generate(values):
        count += len(piece)
        if count > MOST_CHARACTERS:
            raise _Refusal(f"it writes more than {MOST_CHARACTERS:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"
    text = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
    line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return (" ".join(text[:MOST_REASON_CHARACTERS].split()) or type(error).__name__) + line


def _bound_memory() -> None:
    held = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    limit = MEMORY_BYTES + (int(held[1]) << 10 if held else 0)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def main() -> None:
    """Answer until stdin ends."""
    _bound_memory()
    template = None
    for line in sys.stdin.buffer:
        signal.alarm(LONGEST_SECONDS)
        try:
            request = json.loads(line)
            if "source" in request:
                template, text = _compiled(request["source"]), ""
            else:
                assert template is not None
                text = _rendered(template, request["values"])
            answer = json.dumps({"text": text}).encode()
        except Exception as error:  # a template may fail in any way
            answer = json.dumps({"error": _reason(error)}).encode()
        signal.alarm(0)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
