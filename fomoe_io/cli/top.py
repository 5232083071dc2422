"""fomoe-top: what a fomoe-serve is doing, in the terminal, from the numbers that its page shows."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from fomoe_io.cli.common import run_command
from fomoe_io.cli.parser import Parser, new_parser, number, whole
from fomoe_io.errors import UsageError, printable
from fomoe_io.units import format_rate

PROGRAM = "fomoe-top"
BAR_COLUMNS = 20
_SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*?)\})? ([-+0-9.eE]+)$")


def parser() -> Parser:
    """The command line."""
    p = new_parser(
        PROGRAM,
        "Watch a fomoe-serve: speed, where experts are found, drive, stalls.",
        "fomoe-top\nfomoe-top http://127.0.0.1:8080 --every 2",
    )
    p.add_argument("url", nargs="?", default="http://127.0.0.1:8080", metavar="URL", help="of the server")
    p.add_argument("--every", type=number, default=1.0, metavar="SECONDS", help="between two looks")
    p.add_argument("--count", type=whole, default=0, metavar="N", help="looks; 0: until Ctrl-C")
    p.add_argument("--api-key", metavar="KEY", help="where the server asks for one")
    return p


def samples(text: str) -> dict[str, float]:
    """Prometheus' text as name, or name{labels}, -> value."""
    found = {}
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is not None:
            found[f"{match[1]}{{{match[2]}}}" if match[2] else match[1]] = float(match[3])
    return found


def screen(before: dict[str, float], now: dict[str, float], seconds: float, columns: int) -> list[str]:
    """Lines about what happened between two looks."""
    seconds = max(seconds, 1e-9)

    def change(name: str) -> float:
        return now.get(name, 0.0) - before.get(name, 0.0)

    tiers = {
        match[1]: change(name)
        for name in now
        if (match := re.fullmatch(r'fomoe_expert_hits_total\{tier="(\w+)"\}', name))
    }
    requests = max(sum(tiers.values()), 1)
    lines = [
        f"prompt  {change('llamacpp:prompt_tokens_total') / seconds:8.1f} tok/s",
        f"gen     {change('llamacpp:tokens_predicted_total') / seconds:8.1f} tok/s",
    ]
    for tier, hits in tiers.items():
        share = hits / requests
        filled = round(share * BAR_COLUMNS)
        lines.append(f"{tier:8}{100 * share:6.1f} %  {'#' * filled}{'.' * (BAR_COLUMNS - filled)}")
    lines.append(f"drive   {format_rate(change('fomoe_nvme_read_bytes_total') / seconds):>10}")
    lines.append(f"stall   {100 * min(1.0, change('fomoe_nvme_stall_seconds_total') / seconds):6.0f} %")
    return [printable(line)[: max(columns - 1, 1)] for line in lines]


def _look(url: str, key: str | None) -> dict[str, float]:
    request = urllib.request.Request(f"{url.rstrip('/')}/metrics")
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return samples(response.read().decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        fix = {401: "--api-key KEY", 501: "a server without --no-metrics"}.get(error.code)
        raise UsageError(f"{url} answers {error.code}", hint=fix) from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UsageError(
            f"{url} does not answer: {getattr(error, 'reason', error)}", hint="fomoe-serve MODEL"
        ) from None


def run(argv: Sequence[str] | None = None) -> int:
    """The command without its error handling."""
    options = parser().parse_args(argv)
    if not options.url.startswith(("http://", "https://")):
        options.url = f"http://{options.url}"
    if options.every <= 0:
        raise UsageError("--every takes a time", hint="--every 1")
    return _watch(options)


def _watch(options: argparse.Namespace) -> int:
    before, then, count = _look(options.url, options.api_key), time.monotonic(), 0
    clear = "\x1b[H\x1b[J" if sys.stdout.isatty() else ""
    while not options.count or count < options.count:
        time.sleep(options.every)
        now, seconds = _look(options.url, options.api_key), time.monotonic() - then
        size = shutil.get_terminal_size()
        lines = [printable(options.url)[: size.columns - 1], *screen(before, now, seconds, size.columns)]
        print(clear + "\n".join(lines[: size.lines - 1] if clear else lines), flush=True)
        before, then, count = now, time.monotonic(), count + 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fomoe-top`."""
    return run_command(PROGRAM, run, argv)


if __name__ == "__main__":
    sys.exit(main())
