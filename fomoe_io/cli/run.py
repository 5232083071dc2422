"""fomoe-run: answer a prompt, or talk."""

from __future__ import annotations

import argparse
import io
import json
import os
import select
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from fomoe_io import commands
from fomoe_io.cli.chat import Chat
from fomoe_io.cli.common import decoded, note, run_command
from fomoe_io.cli.grammar_options import add_grammar_options, answer_form
from fomoe_io.cli.kept_profile import keep_profile
from fomoe_io.cli.llama_options import RUN
from fomoe_io.cli.model_help import explained
from fomoe_io.cli.options import (
    add_cache_options,
    add_engine_options,
    add_model,
    add_reasoning_options,
    add_sampling_options,
    add_template_options,
    chat_template,
    engine_config,
    model_path,
    note_memory,
    sampling_config,
    smaller_context_helps,
    thinking,
)
from fomoe_io.cli.parser import Parser, new_parser, valid_text, whole
from fomoe_io.cli.progress import Loading
from fomoe_io.cli.report import Report
from fomoe_io.cli.talk import Talk, too_long
from fomoe_io.cli.ui import shown
from fomoe_io.engine import Engine
from fomoe_io.errors import UsageError
from fomoe_io.open_model import DEFAULT_CONTEXT_TOKENS
from fomoe_io.stats import format_banner, format_footer
from fomoe_io.storage.store import Store
from fomoe_io.system.files import check_targets
from fomoe_io.text.sampler import unbuilt_samplers
from fomoe_io.text.tokenizer import Tokenizer

EXAMPLES = """
fomoe-run MODEL.gguf                          talk; /help lists the commands
fomoe-run /nvme0/model --ram 16G -c 8192      a packed store, in 16 GiB of memory
fomoe-run MODEL.gguf -p "Why is the sky blue?" -n 200
fomoe-run MODEL.gguf -f - < question.txt > answer.txt
fomoe-run MODEL.gguf -p "Hello" --json - | jq .tokens_per_second
"""
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "'": "'", '"': '"', "\\": "\\"}


def parser() -> Parser:
    """The command line."""
    p = new_parser("fomoe-run", "Run a Mixture-of-Experts model; without a prompt, interactively.", EXAMPLES)
    add_model(p)
    _add_prompt(p)
    _add_conversation(p)
    add_sampling_options(p)
    add_grammar_options(p.add_argument_group("form of answers (pip install 'fomoe_io[grammar]')"))
    _add_output(p)
    add_engine_options(p)
    add_cache_options(p)
    group = p.add_argument_group("what earlier runs have learned")
    profile = group.add_mutually_exclusive_group()
    profile.add_argument("--profile", type=Path, metavar="FILE",
        help="start with the experts that this profile counts most, and add this run's (default: one a model, in the "
        "cache directory); never changes the answer")  # fmt: skip
    profile.add_argument("--no-profile", action="store_true", help="neither use nor keep one")
    p.add_foreign(RUN)
    p.add_argument_group(
        "of llama.cpp",
        "Its other options are accepted with a note where they change no answer, else explained.",
    )
    return p


def _add_prompt(p: Parser) -> None:
    group = p.add_argument_group("prompt and answer")
    group.add_argument("-p", "--prompt", type=valid_text, metavar="TEXT", help="answer this and exit")
    group.add_argument("-f", "--file", type=Path, metavar="FILE", help="the prompt is in a file; - is standard input")
    group.add_argument("-e", "--escape", action="store_true", default=True,
        help=r"\n, \t, \r, \', \" and \\ in -p, -sys and -r are what C has them for (default)")  # fmt: skip
    group.add_argument("--no-escape", dest="escape", action="store_false", help="they are what they look like")
    group.add_argument("-n", "--predict", "--n-predict", type=whole, default=-1, metavar="N",
        help="tokens of an answer at most; -1: until its end")  # fmt: skip
    group.add_argument("-r", "--reverse-prompt", "--stop", dest="stop", type=valid_text, action="append", default=[],
        metavar="TEXT", help="end an answer before this text (repeat)")  # fmt: skip
    group.add_argument("--ignore-eos", action="store_true", help="go on at an end-of-text token")
    group.add_argument("--raw", "-no-cnv", "--no-conversation", action="store_true",
        help="no chat template: continue the text")  # fmt: skip


def _add_conversation(p: Parser) -> None:
    group = p.add_argument_group("conversation")
    group.add_argument("-sys", "--system-prompt", "--system", dest="system", type=valid_text, metavar="TEXT",
        help="system message")  # fmt: skip
    group.add_argument("-sysf", "--system-prompt-file", dest="system_file", type=Path, metavar="FILE",
        help="the same, from a file")  # fmt: skip
    group.add_argument("-cnv", "--conversation", action="store_true", help="after -p or -f, go on talking")
    group.add_argument("-st", "--single-turn", action="store_true", help="end after one answer")
    add_reasoning_options(group)
    group.add_argument("--reasoning-preserve", action="store_true",
        help="keep thoughts in the history: it is longer, and never read again")  # fmt: skip
    group.add_argument("--no-reasoning-preserve", dest="reasoning_preserve", action="store_false",
        help="as the template does (default)")  # fmt: skip
    add_template_options(group)
    group.add_argument("--chat-template-kwargs", metavar="JSON", help='for the template: {"name": value}')


def _add_output(p: Parser) -> None:
    group = p.add_argument_group("output (answers to stdout, all else to stderr)")
    group.add_argument("--display-prompt", action="store_true", default=True,
        help="with -p or -f and no template: print the prompt, too (default)")  # fmt: skip
    group.add_argument("--no-display-prompt", dest="display_prompt", action="store_false", help="print the answer only")
    group.add_argument(
        "-o", "--output", "--output-file", type=Path, metavar="FILE", help="write the answers there, too"
    )
    group.add_argument("--json", type=Path, metavar="FILE",
        help="write the statistics, also of a run that fails; - is stdout, instead of the answer")  # fmt: skip
    group.add_argument(
        "--watch", action="store_true", help="on a terminal: a last line that shows tiers, drive and speed"
    )
    group.add_argument("--show-timings", action="store_true", default=True, help="each answer's speed (default)")
    group.add_argument("--no-show-timings", dest="show_timings", action="store_false", help="without")
    group.add_argument("-co", "--color", nargs="?", choices=("on", "off", "auto"), const="on", default="auto",
        metavar="on|off|auto", help="dim thoughts and remarks; auto: on a terminal without NO_COLOR")  # fmt: skip
    group.add_argument("-q", "--quiet", action="store_true", help="no banner, no progress, no notes, no statistics")
    group.add_argument(
        "--completion-bash", action=_Completion, nargs=0, help="print a completion script for bash and exit"
    )


class _Completion(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from fomoe_io.cli.completion import script

        print(script("bash"))
        parser.exit()


# ---- what was asked for ----


def _unescaped(text: str) -> str:
    r"""`\n` and the like as llama.cpp reads them; what is no escape stays."""
    parts = text.split("\\")
    out, i = [parts[0]], 1
    while i < len(parts):
        part = parts[i]
        if part == "" and i + 1 < len(parts):  # a backslash that stands for itself
            out.append("\\" + parts[i + 1])
            i += 1
        elif part[:1] in _ESCAPES and part:
            out.append(_ESCAPES[part[0]] + part[1:])
        else:
            out.append("\\" + part)
        i += 1
    return "".join(out)


def _read_escapes(options: argparse.Namespace) -> None:
    if not options.escape:
        return
    options.stop = [_unescaped(text) for text in options.stop]
    for name in ("prompt", "system"):
        if getattr(options, name) is not None:
            setattr(options, name, _unescaped(getattr(options, name)))


def _prompt(options: argparse.Namespace) -> str | None:
    """The one-shot prompt; None means interactive.  Of a file or a pipe one final line end is nobody's."""
    if options.prompt is not None and options.file is not None:
        raise UsageError("a prompt was given both by -p and by -f")
    if options.prompt is not None:
        return str(options.prompt)
    if options.file is not None and str(options.file) != "-":
        return decoded(options.file.read_bytes()).removesuffix("\n")
    if sys.stdin is None:
        raise UsageError("there is no prompt, and standard input is closed", hint='-p "Once upon a time"')
    return None if sys.stdin.isatty() and options.file is None else _piped().removesuffix("\n")


def _piped() -> str:
    """Standard input, read as a file is."""
    return decoded(sys.stdin.buffer.read()) if isinstance(sys.stdin, io.TextIOWrapper) else sys.stdin.read()


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _is_waiting(stream: TextIO | None) -> bool:
    """Whether somebody has piped something in that nobody will read."""
    try:
        descriptor = stream.fileno() if stream is not None else -1
        kind = os.fstat(descriptor)
        if stat.S_ISREG(kind.st_mode):
            return kind.st_size > 0
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return stat.S_ISFIFO(kind.st_mode) and any(events & select.POLLIN for _, events in poll.poll(0))
    except (OSError, ValueError, io.UnsupportedOperation):
        return False


def _system(options: argparse.Namespace) -> str | None:
    if options.system_file is None:
        return None if options.system is None else str(options.system)
    if options.system is not None:
        raise UsageError("a system message was given both by -sys and by -sysf")
    return decoded(options.system_file.read_bytes()).removesuffix("\n")


def _template_names(options: argparse.Namespace) -> dict[str, Any]:
    if options.chat_template_kwargs is None:
        return {}
    try:
        names = json.loads(options.chat_template_kwargs)
        if not isinstance(names, dict):
            raise ValueError
    except (ValueError, RecursionError):
        hint = """--chat-template-kwargs '{"enable_thinking": false}'"""
        raise UsageError(
            f"--chat-template-kwargs {options.chat_template_kwargs} is no JSON object", hint=hint
        ) from None
    return names


def _check(options: argparse.Namespace) -> None:
    """Mistakes that should not cost the loading."""
    sampling_config(options)
    options.form = answer_form(options)
    options.is_mute = options.json is not None and str(options.json) == "-"
    talks = options.conversation or (options.prompt is None and options.file is None and _is_terminal(sys.stdin))
    if options.is_mute and talks:
        raise UsageError("--json - takes the place of the answers on stdout", hint='-p "...", or --json FILE')


def _check_length(
    path: Path, prompt: str | None, options: argparse.Namespace, context: int | None, report: Report
) -> None:
    """A prompt that fills the context by itself is refused before the weights are read.

    Raises
    ------
    UsageError
    """
    if prompt is None:
        return
    store = Store.open(path)
    trained = store.metadata.integer(f"{store.architecture}.context_length", None) or DEFAULT_CONTEXT_TOKENS
    context = context or min(trained, DEFAULT_CONTEXT_TOKENS)
    if len(prompt.encode()) < context:  # a token is a byte at least
        return
    count = len(Tokenizer.from_metadata(store.metadata).encode(prompt))
    if count >= context:
        report.add(context_tokens=context)
        raise too_long(count, context, options.predict, trained)


# ---- running ----


@contextmanager
def _last_words(engine: Engine, options: argparse.Namespace, report: Report) -> Iterator[None]:
    """Keep the profile and print the statistics, also when a signal ends the run."""
    failed = True
    try:
        yield
        failed = False
    except KeyboardInterrupt:
        failed = False
        raise
    finally:
        report.take(engine)
        keep_profile(engine)
        if not failed and not options.quiet:
            print(format_footer(report.statistics), file=sys.stderr)


def _chat(engine: Engine, options: argparse.Namespace) -> Chat:
    return Chat(
        engine,
        raw=options.raw,
        system=options.system,
        template=options.template,
        thinking=thinking(options),
        names=_template_names(options),
        keeps_thoughts=options.reasoning_preserve,
    )


def _one_shot(talk: Talk, prompt: str, options: argparse.Namespace) -> None:
    tokens = talk.tokens_of(prompt)
    if talk.chat.template is None and options.display_prompt and not options.is_mute:
        print(shown(prompt), end="", flush=True)
    talk.answer(tokens)


def _banner(engine: Engine, options: argparse.Namespace) -> None:
    for text in format_banner(engine):
        print(text, file=sys.stderr)
    trained = engine.shape.context_tokens
    if engine.context_tokens > trained:
        note(
            f"note: the model was trained on {trained} tokens, -c is {engine.context_tokens}: beyond, answers get worse"
        )
    for key in unbuilt_samplers(engine.metadata):
        note(f"note: the model asks for {key}, a sampler that is not built")


def run(argv: Sequence[str] | None = None) -> int:
    """The command without its error handling."""
    options = parser().parse_args(argv)
    _read_escapes(options)
    _check(options)
    check_targets([None if options.is_mute else options.json, options.output])
    check_targets([options.profile], makes_directories=True)
    if not options.quiet:
        for text in options.notes:
            note(f"note: {text}")
    with Report(options.json) as report, ExitStack() as files:
        path, prompt = model_path(options), _prompt(options)
        report.add(path=str(path))
        options.system, options.template = _system(options), chat_template(options)
        _template_names(options)
        config = replace(
            engine_config(options, path),
            profile=None if options.no_profile else options.profile or "learned",
            progress=(loading := Loading(path.name, quiet=options.quiet)),
        )
        if not options.quiet:
            note_memory(options)
            if options.prompt is not None and _is_waiting(sys.stdin):
                note("note: standard input is not read, since -p gives the prompt (-f - reads it)")
        copy = files.enter_context(options.output.open("w")) if options.output is not None else None
        with explained(path), smaller_context_helps(options), loading:
            _check_length(path, prompt, options, config.context_tokens, report)
            engine = Engine.open(path, config)
        with engine:
            _answer(engine, prompt, copy, options, report)
    return 0


def _answer(
    engine: Engine, prompt: str | None, copy: TextIO | None, options: argparse.Namespace, report: Report
) -> None:
    if not options.quiet:
        _banner(engine, options)
    with _last_words(engine, options, report):
        talk = Talk(engine, _chat(engine, options), sampling_config(options, engine.metadata), options, report, copy)
        if prompt is not None and not options.conversation:
            _one_shot(talk, prompt, options)
            return
        talk.greet()
        talk.run(prompt)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fomoe-run`."""
    return run_command("fomoe-run", run, argv)


if __name__ == "__main__":
    sys.exit(commands.run())
