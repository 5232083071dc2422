"""fomoe-layout: from a GGUF to a store, and everything about stores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fomoe_io import commands
from fomoe_io.cli.common import run_command
from fomoe_io.cli.parser import Parser, checked, new_parser
from fomoe_io.units import parse_bytes, parse_rate
from layout_tool import collect
from layout_tool.index import index
from layout_tool.inspect import inspect
from layout_tool.mirror import mirror, unmirror
from layout_tool.outlook import Machine, Wanted
from layout_tool.pack import pack
from layout_tool.plan import plan
from layout_tool.relocate import relocate
from layout_tool.striping import SHARES, Striping
from layout_tool.targets import IGNORE_FREE_SPACE
from layout_tool.verify import verify

PROGRAM = "fomoe-layout"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(PROGRAM, _main, argv)


def _main(argv: Sequence[str] | None) -> int:
    options = parser().parse_args(argv)
    return int(options.run(options))


def parser() -> Parser:
    """The command line."""
    p = new_parser(PROGRAM, "Write the experts of a GGUF so that each is read from a drive in one request.")
    commands = p.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, help_: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.")

    sub = command("plan", "whether a model fits and how fast it will be; what pack would write, and how long it takes")
    sub.add_argument("model", nargs="?", metavar="MODEL", help="GGUF (of shards the first), store, or http address")
    _add_forecast(sub)
    _add_targets(sub, required=False)
    _add_profile(sub)
    _add_calibration(sub)
    _add_by(sub)
    sub.add_argument(
        "--probe", action="store_true", help="measure the drives by a file of at most 1 GiB, which is removed again"
    )
    sub.add_argument("--json", action="store_true", help="for programs")
    _add_ignore_free_space(sub)
    sub.set_defaults(
        run=lambda o: plan(
            Wanted(o.model, o.hf_repo, o.hf_file, o.hf_token),
            o.to,
            o.profile,
            Striping(o.by, o.calibration, measures=o.probe, ignore_free_space=o.ignore_free_space),
            Machine(o.ram, o.vram, o.drive, o.ctx_size, o.threads),
            as_json=o.json,
        )
    )

    sub = command("pack", "write a store; the same command continues one that was interrupted")
    _add_model(sub)
    _add_targets(sub, required=True)
    _add_profile(sub)
    _add_calibration(sub)
    _add_by(sub)
    _add_overwrite(sub)
    _add_ignore_free_space(sub)
    sub.set_defaults(
        run=lambda o: pack(
            o.model,
            o.to,
            o.profile,
            Striping(o.by, o.calibration, ignore_free_space=o.ignore_free_space),
            overwrite=o.overwrite,
        )
    )

    sub = command("index", "write only a manifest that points into the GGUF, to run it where it lies")
    _add_model(sub)
    sub.add_argument("--to", type=Path, required=True, metavar="DIR", help="directory of the store")
    sub.add_argument("--checksums", action="store_true", help="read the model once, so that verify can check it later")
    _add_overwrite(sub)
    sub.set_defaults(run=lambda o: index(o.model, o.to, checksums=o.checksums, overwrite=o.overwrite))

    sub = command("verify", "read every byte of a store again and compare its checksums")
    sub.add_argument("store", type=Path, metavar="STORE")
    sub.add_argument("--against", type=Path, metavar="MODEL.gguf", help="compare with the bytes of the GGUF, too")
    sub.set_defaults(run=lambda o: verify(o.store, o.against))

    sub = command("inspect", "one screen about a store or a GGUF")
    sub.add_argument("store", type=Path, metavar="STORE|GGUF")
    sub.add_argument("--json", action="store_true", help="for programs")
    sub.set_defaults(run=lambda o: inspect(o.store, as_json=o.json))

    sub = command("relocate", "tell a striped store where its other directories are now")
    sub.add_argument("store", type=Path, metavar="STORE", help="the directory with the manifest")
    sub.add_argument("--to", type=Path, action="append", required=True, metavar="DIR", help="each other directory")
    sub.set_defaults(run=lambda o: relocate(o.store, o.to))

    sub = command("mirror", "copy a store's data to another drive, which then serves reads too and takes over")
    sub.add_argument("store", type=Path, metavar="STORE", help="the directory with the manifest")
    where = sub.add_mutually_exclusive_group(required=True)
    where.add_argument("--to", type=Path, metavar="DIR", help="directory on the other drive")
    where.add_argument("--remove", action="store_true", help="have none any more: forget the copies and remove them")
    _add_ignore_free_space(sub)
    sub.set_defaults(
        run=lambda o: unmirror(o.store) if o.remove else mirror(o.store, o.to, ignore_free_space=o.ignore_free_space)
    )

    sub = command("profile", "count which experts a text picks, for pack --profile")
    sub.add_argument("model", type=Path, metavar="MODEL", help="store or GGUF")
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("-f", "--file", type=Path, metavar="TEXT", help="text to run through the model")
    source.add_argument("--from", dest="source", type=Path, metavar="COUNTS", help="convert a .freq or imatrix GGUF")
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the counts go")
    sub.add_argument(
        "-c", "--ctx-size", type=_positive, default=collect.CONTEXT_TOKENS, metavar="N", help="tokens of a piece"
    )
    sub.add_argument("--chunks", type=_positive, default=0, metavar="N", help="pieces of -c tokens at most")
    sub.add_argument("--ram", type=checked(parse_bytes), metavar="SIZE", help="memory budget, such as 16G")
    sub.set_defaults(run=_profile)
    return p


def _profile(options: argparse.Namespace) -> int:
    if options.source is not None:
        return collect.convert(options.model, options.source, options.output)
    return collect.collect(
        options.model,
        options.file,
        options.output,
        context=options.ctx_size,
        chunks=options.chunks,
        ram_bytes=options.ram,
    )


def _sum_of_sizes(text: str) -> int:
    return sum(parse_bytes(size) for size in text.split(","))


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 22:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="a GGUF file, or the first of its shards")


def _add_forecast(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-hf", "-hfr", "--hf-repo", metavar="USER/MODEL[:QUANT]", help="of the hub: its header alone")
    parser.add_argument("-hff", "--hf-file", metavar="FILE", help="with -hf: this file of it, or its first shard")
    parser.add_argument("-hft", "--hf-token", metavar="TOKEN", help="for the hub (default: $HF_TOKEN)")
    parser.add_argument("--ram", type=checked(parse_bytes), metavar="SIZE", help="a row for this memory, such as 16G")
    parser.add_argument("--vram", type=checked(_sum_of_sizes), metavar="SIZE", help="and for a card, or cards: 15G,15G")
    parser.add_argument(
        "--drive",
        type=checked(parse_rate),
        metavar="RATE",
        help="of a drive: 7G (default: measured where the file is)",
    )
    parser.add_argument("-t", "--threads", type=_positive, metavar="N", help="default: all processors of this process")
    parser.add_argument(
        "-c", "--ctx-size", type=_positive, metavar="N", help="context, in tokens (default: the model's, at most 4096)"
    )


def _add_targets(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--to",
        type=Path,
        action="append",
        required=required,
        default=None if required else [],
        metavar="DIR",
        help="directory of the store; repeat it to stripe the experts over several drives",
    )


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="expert counts: fomoe-layout profile, .freq, or an imatrix GGUF"
    )


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="of each --to in turn, from fomoe-bench io --calibrate: stripe by it instead of a quick probe",
    )


def _add_by(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by",
        choices=SHARES,
        default=SHARES[0],
        help="how several drives share the experts: by speed while there is room (default), by free space, or evenly",
    )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace the store that the directory holds")


def _add_ignore_free_space(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        IGNORE_FREE_SPACE, action="store_true", help="write though the file system says that it has too little room"
    )


if __name__ == "__main__":
    sys.exit(commands.layout())
