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
from fomoe_io.cli.common import note, run_command
from fomoe_io.cli.kept_profile import keep_profile
from fomoe_io.cli.llama_options import SERVE
from fomoe_io.cli.model_help import missing
from fomoe_io.cli.options import (
    add_cache_options,
    add_engine_options,
    add_model,
    add_reasoning_options,
    add_sampling_options,
    add_template_options,
    as_options,
    chat_template,
    chosen_sampling,
    engine_config,
    model_path,
    sampling_config,
    thinking,
)
from fomoe_io.cli.parser import Parser, checked, new_parser, package_version, whole
from fomoe_io.engine import Engine
from fomoe_io.errors import UsageError
from fomoe_io.serve.settings import ServeConfig
from fomoe_io.stats import format_banner, format_footer
from fomoe_io.text.sampler import SamplingConfig, unbuilt_samplers
from fomoe_io.units import parse_bytes

KEY_VARIABLE = "FOMOE_API_KEY"
_PENALTIES = ("presence_penalty", "frequency_penalty")
"""The server's own, over the tokens that a request's `repeat_last_n` counts."""

EXAMPLES = """
fomoe-serve MODEL.gguf                          http://127.0.0.1:8080, this machine only
fomoe-serve /nvme0/model --ram 16G -c 8192      a packed store, in 16 GiB of memory
FOMOE_API_KEY=secret fomoe-serve MODEL.gguf --host 0.0.0.0 --port 80
"""


def parser() -> Parser:
    """The command line."""
    p = new_parser("fomoe-serve", "Serve a Mixture-of-Experts model over HTTP, as llama-server does.", EXAMPLES)
    add_model(p)
    _add_network(p)
    _add_requests(p)
    add_sampling_options(p, "sampling, where a request says nothing")
    add_engine_options(p)
    add_cache_options(p)
    p.add_foreign(SERVE)
    p.add_argument_group(
        "of llama-server",
        "Its other options are accepted with a note where they change no answer, and explained where not.",
    )
    return p


def _add_network(p: Parser) -> None:
    d = ServeConfig()
    group = p.add_argument_group("network")
    group.add_argument("--host", default=d.host, help="address to listen on (default: this machine only)")
    group.add_argument("--port", type=whole, default=d.port, help="0 takes a free one (default: %(default)s)")
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
    group.add_argument("--slot-save-path", type=Path, metavar="DIR", help="where /slots saves sessions to files")
    group.add_argument("--no-webui", action="store_true", help="no page at /")
    group.add_argument("-to", "--timeout", type=float, default=d.stall_seconds, metavar="SECONDS",
        help="drop a client that takes longer to send or to accept (default: %(default)g)")  # fmt: skip


def _add_requests(p: Parser) -> None:
    d = ServeConfig()
    group = p.add_argument_group("requests")
    group.add_argument("--queue", type=whole, default=d.queue_requests, metavar="N",
        help="requests that may wait; others are told to come again (default: %(default)s)")  # fmt: skip
    group.add_argument("-np", "--parallel", type=whole, default=d.parallel, metavar="N",
        help="requests that are answered at once, with memory for a context each (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-body", type=checked(parse_bytes), metavar="SIZE",
        help="largest body (default: what a full context may need)")  # fmt: skip
    group.add_argument("-n", "--predict", "--n-predict", type=whole, default=-1, metavar="N",
        help="tokens of an answer at most (-1: until the context is full)")  # fmt: skip
    group.add_argument("-ub", "--ubatch-size", type=whole, metavar="N",
        help="prompt tokens between looks at whether the client is there (default: a second's)")  # fmt: skip
    add_template_options(group)
    group.add_argument("--reasoning-format", choices=("auto", "deepseek", "none"), default="auto",
        help="where thoughts go: reasoning_content (auto, deepseek), or the text (none)")  # fmt: skip
    add_reasoning_options(group)
    group.add_argument("-q", "--quiet", action="store_true", help="no banner and no statistics line")
    profile = p.add_mutually_exclusive_group()
    profile.add_argument("--profile", type=Path, metavar="FILE",
        help="as of fomoe-run: which experts to start with, and where to count (default: one a model)")  # fmt: skip
    profile.add_argument("--no-profile", action="store_true", help="neither use nor keep one")


def serve_config(options: argparse.Namespace) -> ServeConfig:
    """What the options ask for.

    Raises
    ------
    UsageError, OSError
        They do not go together, or a file can't be read.
    """
    sampling = replace(sampling_config(options), presence_penalty=0.0, frequency_penalty=0.0)
    chosen = chosen_sampling(options)
    with as_options():
        return _settings(options, sampling, chosen)


def _settings(options: argparse.Namespace, sampling: SamplingConfig, chosen: dict[str, Any]) -> ServeConfig:
    return ServeConfig(
        host=options.host,
        port=options.port,
        alias=options.alias,
        api_keys=_keys(options),
        allowed_hosts=tuple(options.allow_host),
        allowed_origins=tuple(origin.rstrip("/") for origin in options.cors),
        queue_requests=options.queue,
        parallel=options.parallel,
        body_bytes=options.max_body,
        sampling=sampling,
        chosen_sampling={name: value for name, value in chosen.items() if name not in _PENALTIES},
        presence_penalty=chosen.get("presence_penalty", 0.0),
        frequency_penalty=chosen.get("frequency_penalty", 0.0),
        most_tokens=options.predict,
        piece_tokens=options.ubatch_size,
        chat_template=chat_template(options),
        splits_thoughts=options.reasoning_format != "none",
        thinking=thinking(options),
        has_metrics=not options.no_metrics,
        has_slots=not options.no_slots,
        has_page=not options.no_webui,
        stall_seconds=options.timeout,
        version=package_version(),
        slot_folder=options.slot_save_path,
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


def run(argv: Sequence[str] | None = None) -> int:
    """The command without its error handling."""
    options = parser().parse_args(argv)
    path, config = model_path(options), serve_config(options)
    if config.slot_folder is not None and not config.slot_folder.is_dir():
        raise UsageError(
            f"--slot-save-path {config.slot_folder} is no directory", hint=f"mkdir -p {config.slot_folder}"
        )
    engine_options = replace(
        engine_config(options, path),
        profile=None if options.no_profile else options.profile or "learned",
        sessions=config.parallel,
    )
    try:
        from fomoe_io.serve.security import is_loopback
        from fomoe_io.serve.server import Running
    except ModuleNotFoundError as error:
        raise UsageError(f"package {error.name} is missing", hint="pip install 'fomoe_io[serve]'") from None
    if not path.exists():
        raise missing(path)

    def announce(engine: Engine) -> None:
        if not options.quiet:
            print("\n".join(format_banner(engine)), file=sys.stderr)
            for key in unbuilt_samplers(engine.metadata):
                note(f"note: the model asks for {key}, a sampler that is not built")
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
