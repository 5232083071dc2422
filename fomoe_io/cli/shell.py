"""fomoe shell: completion scripts and man pages, made from the parsers of the commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fomoe_io.cli.common import run_command
from fomoe_io.cli.completion import COMMANDS, SHELLS, man_page, script
from fomoe_io.cli.parser import Parser, new_parser
from fomoe_io.errors import UsageError

EXAMPLES = """
eval "$(fomoe shell --completion bash)"         completion, in this shell
fomoe shell --completion fish > ~/.config/fish/completions/fomoe.fish
fomoe shell --man ~/.local/share/man/man1       man pages, for man fomoe-run
"""


def parser() -> Parser:
    """The command line."""
    p = new_parser("fomoe-shell", "Completion scripts and man pages.", EXAMPLES)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--completion", choices=SHELLS, help="print a completion script")
    what.add_argument("--man", type=Path, metavar="DIR", help="write a man page of each command there")
    return p


def run(argv: Sequence[str] | None = None) -> int:
    """The command without its error handling."""
    options = parser().parse_args(argv)
    if options.completion is not None:
        print(script(options.completion))
    elif options.man is not None:
        options.man.mkdir(parents=True, exist_ok=True)
        for command in COMMANDS:
            (options.man / f"{command}.1").write_text(man_page(command))
        print(f"{len(COMMANDS)} pages in {options.man}", file=sys.stderr)
    else:
        raise UsageError("there is nothing to do", hint="--completion bash, or --man DIR")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fomoe shell`."""
    return run_command("fomoe-shell", run, argv)


if __name__ == "__main__":
    sys.exit(main())
