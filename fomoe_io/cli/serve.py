"""fomoe-serve: a model behind HTTP."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fomoe_io import commands
from fomoe_io.cli.common import (
    add_engine_options,
    add_model,
    checked,
    engine_config,
    model_path,
    new_parser,
    note,
    package_version,
    run_command,
)
from fomoe_io.cli.kept_profile import keep_profile
from fomoe_io.engine import Engine
from fomoe_io.errors import UsageError
from fomoe_io.serve.settings import ServeConfig
from fomoe_io.stats import format_banner, format_footer
from fomoe_io.text.sampler import SamplingConfig
from fomoe_io.units import parse_bytes

KEY_VARIABLE = "FOMOE_API_KEY"

HARMLESS_SWITCHES = {
    ("--jinja",): "templates are always jinja2",
    ("-cb", "--cont-batching"): "one request is answered at a time",
    ("-nocb", "--no-cont-batching"): "one request is answered at a time",
    ("--mlock",): "experts live in memory of their own, which --ram bounds",
    ("--mmap",): "experts are read with O_DIRECT, not mapped",
    ("--no-mmap",): "experts are read with O_DIRECT, not mapped",
    ("-cmoe", "--cpu-moe"): "experts go where --ram and --vram have room",
    ("--no-warmup",): "there is no warm-up run",
    ("--warmup",): "there is no warm-up run",
    ("--metrics",): "/metrics is there unless --no-metrics is given",
    ("--webui",): "the page is there unless --no-webui is given",
    ("--log-disable",): "there is no log beside errors",
    ("--cache-prompt",): "prompts are always continued where that is possible",
}
HARMLESS_VALUES = {
    ("-ngl", "--gpu-layers", "--n-gpu-layers"): "layers go where --vram has room",
    ("-ncmoe", "--n-cpu-moe"): "experts go where --ram and --vram have room",
    ("-fa", "--flash-attn"): "attention has one implementation",
    ("-np", "--parallel"): "one request is answered at a time, the others wait (--queue)",
    ("-ctk", "--cache-type-k"): "the KV cache is float32",
    ("-ctv", "--cache-type-v"): "the KV cache is float32",
    ("--threads-http",): "connections need no threads",
    ("-tb", "--threads-batch"): "prompts are read by the threads of -t",
    ("--cache-reuse",): "what a session has read is continued, never moved",
    ("--numa",): "bind the process with numactl",
}
"""llama-server's, without effect on what is answered: accepted with a note."""


class _Note(argparse.Action):
    """Accept, and say why it does nothing."""

    def __init__(self, *args: Any, why: str, **more: Any) -> None:
        super().__init__(*args, **more)
        self._why = why

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.notes.append(f"{option_string} has no effect: {self._why}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = new_parser("fomoe-serve", "Serve a Mixture-of-Experts model over HTTP, as llama-server does.")
    p.allow_abbrev = False
    p.set_defaults(notes=[])
    add_model(p)
    _add_network(p)
    _add_requests(p)
    _add_sampling(p)
    add_engine_options(p)
    group = p.add_argument_group("of llama-server, accepted without effect")
    for names, why in HARMLESS_SWITCHES.items():
        group.add_argument(*names, action=_Note, nargs=0, why=why, help=argparse.SUPPRESS)
    for names, why in HARMLESS_VALUES.items():
        group.add_argument(*names, action=_Note, why=why, help=argparse.SUPPRESS)
    group.description = ", ".join(names[-1] for names in [*HARMLESS_SWITCHES, *HARMLESS_VALUES])
    return p


def _add_network(p: argparse.ArgumentParser) -> None:
    d = ServeConfig()
    group = p.add_argument_group("network")
    group.add_argument("--host", default=d.host, help="address to listen on (default: this machine only)")
    group.add_argument("--port", type=int, default=d.port, help="0 takes a free one (default: %(default)s)")
    group.add_argument("-a", "--alias", metavar="NAME", help="name of the model in answers")
    group.add_argument("--api-key", action="append", default=[], metavar="KEY",
        help=f"ask for one of these keys (repeat, or separate by commas; safer: {KEY_VARIABLE})")  # fmt: skip
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line")
    group.add_argument("--cors", action="append", default=[], metavar="ORIGIN",
        help="let pages of this site call, such as https://chat.example (repeat; * for all)")  # fmt: skip
    group.add_argument("--allow-host", action="append", default=[], metavar="NAME",
        help="a name that this server is reached by, such as a proxy's (repeat)")  # fmt: skip
    group.add_argument("--no-metrics", action="store_true", help="no /metrics")
    group.add_argument("--no-slots", action="store_true", help="no /slots")
    group.add_argument("--no-webui", action="store_true", help="no page at /")
    group.add_argument("-to", "--timeout", type=float, default=d.stall_seconds, metavar="SECONDS",
        help="drop a client that takes longer to send or to accept (default: %(default)g)")  # fmt: skip


def _add_requests(p: argparse.ArgumentParser) -> None:
    d = ServeConfig()
    group = p.add_argument_group("requests")
    group.add_argument("--queue", type=int, default=d.queue_requests, metavar="N",
        help="requests that may wait; others are told to come again (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-body", type=checked(parse_bytes), metavar="SIZE",
        help="largest body (default: what a full context may need)")  # fmt: skip
    group.add_argument("-n", "--predict", "--n-predict", type=int, default=-1, metavar="N",
        help="tokens of an answer at most (-1: until the context is full)")  # fmt: skip
    group.add_argument("-ub", "--ubatch-size", type=int, metavar="N",
        help="prompt tokens between looks at whether the client is there (default: a second's)")  # fmt: skip
    group.add_argument("--chat-template", metavar="JINJA", help="instead of the model's; chatml is built in")
    group.add_argument("--chat-template-file", type=Path, metavar="FILE")
    group.add_argument("--reasoning-format", choices=("auto", "deepseek", "none"), default="auto",
        help="where thoughts go: reasoning_content (auto, deepseek), or the text (none)")  # fmt: skip
    group.add_argument("--reasoning-budget", type=int, choices=(-1, 0), default=-1, help="0: no thoughts")
    group.add_argument("-q", "--quiet", action="store_true", help="no banner and no statistics line")
    profile = p.add_mutually_exclusive_group()
    profile.add_argument("--profile", type=Path, metavar="FILE",
        help="as of fomoe-run: which experts to start with, and where to count (default: one a model)")  # fmt: skip
    profile.add_argument("--no-profile", action="store_true", help="neither use nor keep one")


def _add_sampling(p: argparse.ArgumentParser) -> None:
    d = SamplingConfig()
    group = p.add_argument_group("sampling, where a request says nothing")
    group.add_argument("-s", "--seed", type=int, help="-1 and default: a random one")
    group.add_argument("--temp", "--temperature", type=float, default=d.temperature, help="0 is greedy")
    group.add_argument("--top-k", type=int, default=d.top_k)
    group.add_argument("--top-p", type=float, default=d.top_p)
    group.add_argument("--min-p", type=float, default=d.min_p)
    group.add_argument("--repeat-penalty", type=float, default=d.repeat_penalty)
    group.add_argument("--repeat-last-n", type=int, default=d.repeat_last)
    group.add_argument("--presence-penalty", type=float, default=0.0)
    group.add_argument("--frequency-penalty", type=float, default=0.0)


def serve_config(options: argparse.Namespace) -> ServeConfig:
    """What the options ask for.

    Raises
    ------
    UsageError, OSError
        They do not go together, or a file can't be read.
    """
    sampling = SamplingConfig(
        temperature=options.temp,
        top_k=max(options.top_k, 0),
        top_p=options.top_p,
        min_p=options.min_p,
        repeat_penalty=options.repeat_penalty,
        repeat_last=options.repeat_last_n,
        seed=None if options.seed is not None and options.seed < 0 else options.seed,
    )
    return ServeConfig(
        host=options.host,
        port=options.port,
        alias=options.alias,
        api_keys=_keys(options),
        allowed_hosts=tuple(options.allow_host),
        allowed_origins=tuple(origin.rstrip("/") for origin in options.cors),
        queue_requests=options.queue,
        body_bytes=options.max_body,
        sampling=sampling,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        most_tokens=options.predict,
        piece_tokens=options.ubatch_size,
        chat_template=_template(options),
        splits_thoughts=options.reasoning_format != "none",
        thinking=False if options.reasoning_budget == 0 else None,
        has_metrics=not options.no_metrics,
        has_slots=not options.no_slots,
        has_page=not options.no_webui,
        stall_seconds=options.timeout,
        version=package_version(),
    )


def _keys(options: argparse.Namespace) -> tuple[str, ...]:
    given = [key for text in options.api_key for key in text.split(",")]
    if KEY_VARIABLE in os.environ:
        given.append(os.environ[KEY_VARIABLE])
    if options.api_key_file is not None:
        found = [line.strip() for line in options.api_key_file.read_text().splitlines() if line.strip()]
        if not found:
            raise UsageError(f"{options.api_key_file} holds no key")
        given += found
    return tuple(given)


def _template(options: argparse.Namespace) -> str | None:
    from fomoe_io.serve.prompts import CHATML

    if options.chat_template is not None and options.chat_template_file is not None:
        raise UsageError("a chat template was given both by --chat-template and by --chat-template-file")
    if options.chat_template_file is not None:
        return str(options.chat_template_file.read_text(encoding="utf-8"))
    if options.chat_template is None or "{" in options.chat_template:
        return str(options.chat_template) if options.chat_template else None
    if options.chat_template != "chatml":
        raise UsageError(
            f"{options.chat_template!r} is neither jinja2 nor the name of a template",
            hint="--chat-template chatml, or --chat-template-file FILE",
        )
    return CHATML


def run(argv: Sequence[str] | None = None) -> int:
    """The command without its error handling."""
    options = parser().parse_args(argv)
    path, config = model_path(options), serve_config(options)
    engine_options = replace(
        engine_config(options), profile=None if options.no_profile else options.profile or "learned"
    )
    try:
        from fomoe_io.serve.security import is_loopback
        from fomoe_io.serve.server import Running
    except ModuleNotFoundError as error:
        raise UsageError(f"package {error.name} is missing", hint="pip install 'fomoe_io[serve]'") from None
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory")

    def announce(engine: Engine) -> None:
        if not options.quiet:
            print("\n".join(format_banner(engine)), file=sys.stderr)
        print(f"ready: {running.url}", file=sys.stderr, flush=True)

    running = Running(config, lambda: Engine.open(path, engine_options), on_loaded=announce, before_close=keep_profile)
    for text in options.notes:
        note(f"note: {text}")
    if not config.api_keys and not is_loopback(config.host):
        note(f"note: others can reach {config.host} and no key is asked for (--api-key)")
    running.run(lambda: print(f"loading; listening on {running.url}", file=sys.stderr, flush=True))
    if not options.quiet:
        print(format_footer(running.service.worker.statistics), file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fomoe-serve`."""
    return run_command("fomoe-serve", run, argv)


if __name__ == "__main__":
    sys.exit(commands.serve())
