"""fomoe-bench: measure storage and caching."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from fomoe_io import commands
from fomoe_io.cli.common import package_version

PROGRAM = "fomoe-bench"
VERBS = {
    "io": "drives: fio-style jobs on files or on the records of a store",
    "cache": "policies and memory sizes, on a routing trace",
}
"""Verb -> what it measures; each is a module `bench_VERB` of this package with a `main(argv)`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else ""
    if verb in VERBS:
        return int(import_module(f"fomoe_io.cli.bench_{verb}").main(arguments[1:]))
    if verb == "--version":
        print(f"{PROGRAM} {package_version()}")
        return 0
    usage = [f"usage: {PROGRAM} VERB ...   ({PROGRAM} VERB --help says more)", ""]
    usage += [f"  {name:8}{about}" for name, about in VERBS.items()]
    if verb in ("-h", "--help"):
        print("\n".join(usage))
        return 0
    print("\n".join([f"{PROGRAM}: {verb!r} is no verb" if verb else f"{PROGRAM}: no verb", *usage]), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(commands.bench())
