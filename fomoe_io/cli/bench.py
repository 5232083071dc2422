"""fomoe-bench: measure decoding, storage and caching."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from fomoe_io import commands
from fomoe_io.cli.parser import Parser, new_parser

PROGRAM = "fomoe-bench"
VERBS = {
    "decode": "prompts and answers of a model, in llama-bench's form",
    "io": "drives: fio-style jobs on files or on the records of a store",
    "cache": "policies and memory sizes, on a routing trace",
}
"""Verb -> what it measures; each is a module `bench_VERB` of this package with a `parser()` and a `main(argv)`."""


def parser() -> Parser:
    """The command line, with those of all verbs (for completion and man pages)."""
    p = new_parser(PROGRAM, "Measure decoding, storage and caching.")
    verbs = p.add_subparsers(metavar="VERB", help=argparse.SUPPRESS)
    for name, about in VERBS.items():
        found = import_module(f"fomoe_io.cli.bench_{name}").parser()
        found.description = f"{about[0].upper()}{about[1:]}."
        verbs.choices[name] = found
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else ""
    if verb in VERBS:
        return int(import_module(f"fomoe_io.cli.bench_{verb}").main(arguments[1:]))
    if verb == "--version":
        new_parser(PROGRAM, "").parse_args(arguments)
    usage = [f"usage: {PROGRAM} VERB ...   ({PROGRAM} VERB --help says more)", ""]
    usage += [f"  {name:8}{about}" for name, about in VERBS.items()]
    if verb in ("-h", "--help"):
        print("\n".join(usage))
        return 0
    print("\n".join([f"{PROGRAM}: {verb!r} is no verb" if verb else f"{PROGRAM}: no verb", *usage]), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(commands.bench())
