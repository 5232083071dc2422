"""fomoe-run: answer a prompt, or talk."""

from __future__ import annotations

import argparse
import io
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fomoe_io import commands
from fomoe_io.cli.common import (
    Terminated,
    add_engine_options,
    add_model,
    decoded,
    engine_config,
    model_path,
    new_parser,
    run_command,
    valid_text,
)
from fomoe_io.cli.kept_profile import keep_profile
from fomoe_io.engine import Engine
from fomoe_io.errors import FomoeError, UsageError, printable
from fomoe_io.stats import format_banner, format_footer, write_json
from fomoe_io.system.files import check_targets
from fomoe_io.text.chat import ChatTemplate, Message
from fomoe_io.text.generation import Conversation
from fomoe_io.text.sampler import Sampler, SamplingConfig


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = new_parser("fomoe-run", "Run a Mixture-of-Experts model; without a prompt, interactively.")
    add_model(p)
    p.add_argument("-p", "--prompt", type=valid_text, help="answer this and exit")
    p.add_argument("-f", "--file", type=Path, metavar="FILE", help="the prompt is in a file")
    p.add_argument("-n", "--predict", type=int, default=-1, metavar="N", help="tokens at most (-1: until the end)")
    p.add_argument("--system", type=valid_text, metavar="TEXT", help="system message")
    p.add_argument("--raw", action="store_true", help="no chat template: continue the text")
    p.add_argument(
        "--stop", type=valid_text, action="append", default=[], metavar="TEXT", help="end the answer before this text"
    )
    p.add_argument("--ignore-eos", action="store_true", help="go on at an end-of-text token")
    p.add_argument("--no-display-prompt", action="store_true", help="with -p or -f: print the answer only")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the statistics")
    p.add_argument("-q", "--quiet", action="store_true", help="no banner and no statistics line")
    profile = p.add_mutually_exclusive_group()
    profile.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="start with the experts that this profile counts most, and add this run's (default: one a model, in the "
        "cache directory); never changes the answer",
    )
    profile.add_argument("--no-profile", action="store_true", help="neither use nor keep one")
    d = SamplingConfig()
    group = p.add_argument_group("sampling")
    group.add_argument("-s", "--seed", type=int, help="-1 and default: a random one")
    group.add_argument("--temp", type=float, default=d.temperature, help="0 is greedy")
    group.add_argument("--top-k", type=int, default=d.top_k)
    group.add_argument("--top-p", type=float, default=d.top_p)
    group.add_argument("--min-p", type=float, default=d.min_p)
    group.add_argument("--repeat-penalty", type=float, default=d.repeat_penalty)
    group.add_argument("--repeat-last-n", type=int, default=d.repeat_last)
    add_engine_options(p)
    return p


def _sampling(options: argparse.Namespace) -> SamplingConfig:
    return SamplingConfig(
        temperature=options.temp,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repeat_penalty=options.repeat_penalty,
        repeat_last=options.repeat_last_n,
        seed=None if options.seed is not None and options.seed < 0 else options.seed,
    )


def _prompt(options: argparse.Namespace) -> str | None:
    """The one-shot prompt; None means interactive."""
    if options.prompt is not None and options.file is not None:
        raise UsageError("a prompt was given both by -p and by -f")
    if options.prompt is not None:
        return str(options.prompt)
    if options.file is not None:
        return decoded(options.file.read_bytes())
    if sys.stdin is None:
        raise UsageError("there is no prompt, and standard input is closed", hint='-p "Once upon a time"')
    return None if sys.stdin.isatty() else _piped()


def _piped() -> str:
    """Standard input, read as a file is."""
    return decoded(sys.stdin.buffer.read()) if isinstance(sys.stdin, io.TextIOWrapper) else sys.stdin.read()


@dataclass(slots=True)
class Answer:
    """What was generated so far."""

    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


class Chat:
    """Text in, tokens out: the history of a conversation as the model's template writes it, or raw text."""

    def __init__(self, engine: Engine, *, raw: bool, system: str | None) -> None:
        tokenizer = engine.tokenizer
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        self._tokenizer = tokenizer
        self._system = system
        self.template = None
        if not raw:
            self.template = ChatTemplate.from_metadata(
                engine.metadata,
                bos_text="" if bos is None else tokenizer.token_text(bos),
                eos_text="" if eos is None else tokenizer.token_text(eos),
            )
        if self.template is None and system is not None:
            raise UsageError("a system message needs a chat template, and this run has none", hint="leave out --system")
        self.reset()

    def reset(self) -> None:
        """Start the conversation afresh."""
        self._messages: list[Message] = [_message("system", self._system)] if self._system else []
        self._tokens: list[int] = []

    def ask(self, text: str) -> list[int]:
        """All tokens of the conversation with this question at its end, which :meth:`answered` makes part of it."""
        tokenizer = self._tokenizer
        if self.template is None:
            return [*self._tokens, *tokenizer.encode(text, add_bos=tokenizer.add_bos and not self._tokens)]
        return tokenizer.encode(self.template.render([*self._messages, _message("user", text)]), special=True)

    def answered(self, question: str, tokens: list[int], answer: Answer) -> None:
        """Remember a question, the tokens that :meth:`ask` gave for it, and the answer."""
        self._tokens = [*tokens, *answer.ids]
        self._messages += [_message("user", question), _message("assistant", answer.text)]


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _show_progress(done: int, total: int) -> None:
    if total > 512 and sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rreading {total} prompt tokens: {done}/{total} ({100 * done / total:.0f} %)", end=end, file=sys.stderr)


def _shown(text: str) -> str:
    """What is written of a text: all of it to a file or a pipe, without control sequences to a terminal.

    Nobody wrote them who knows the terminal: a model repeats what it read, which may retitle or clear it.
    """
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else printable(c) for c in text)


def _generate(
    conversation: Conversation, tokens: list[int], sampler: Sampler, answer: Answer, options: argparse.Namespace
) -> None:
    """Generate and print; `answer` also holds what Ctrl-C cut short."""
    try:
        for token, text in conversation.generate(
            tokens, sampler, most=options.predict, stops=options.stop, ignore_eos=options.ignore_eos,
            progress=_show_progress,
        ):  # fmt: skip
            if token >= 0:
                answer.ids.append(token)
            answer.pieces.append(text)
            print(_shown(text), end="", flush=True)
    except KeyboardInterrupt as ended:
        if not options.interactive or isinstance(ended, Terminated):
            raise
        print(" [stopped]", end="", file=sys.stderr)
    finally:
        print(flush=True)


def _one_shot(engine: Engine, prompt: str, options: argparse.Namespace) -> None:
    chat = Chat(engine, raw=options.raw, system=options.system)
    tokens = chat.ask(prompt)
    if not tokens:
        raise UsageError("the prompt is empty", hint='-p "Once upon a time"')
    session = engine.session()
    session.checked(tokens)
    if chat.template is None and not options.no_display_prompt:
        print(_shown(prompt), end="", flush=True)
    answer, conversation = Answer(), Conversation(session, engine.tokenizer)
    try:
        _generate(conversation, tokens, Sampler(_sampling(options)), answer, options)
    except KeyboardInterrupt:
        _write_statistics(engine, options, answer)
        raise
    _write_statistics(engine, options, answer)


def _write_statistics(engine: Engine, options: argparse.Namespace, answer: Answer) -> None:
    if options.json:
        write_json(options.json, {**engine.statistics(), "token_ids": answer.ids, "text": answer.text})


_HELP = (
    "/help this list   /stats statistics so far   /reset forget the conversation   /exit leave   Ctrl-C stops an answer"
)


def _interactive(engine: Engine, options: argparse.Namespace) -> None:
    from fomoe_io.cli.prompt import read_line

    chat = Chat(engine, raw=options.raw, system=options.system)
    if chat.template is None and not options.raw:
        print("this model has no chat template: it continues your text (/help for commands)", file=sys.stderr)
    conversation = Conversation(engine.session(), engine.tokenizer)
    sampler = Sampler(_sampling(options))
    while True:
        line = read_line()
        if line is None or line.strip() in ("/exit", "/quit"):
            break
        command = line.strip()
        if not command:
            continue
        if command == "/help":
            print(_HELP, file=sys.stderr)
        elif command == "/stats":
            print(format_footer(engine.statistics()), file=sys.stderr)
        elif command == "/reset":
            chat.reset()
            conversation.reset()
            sampler.reset()
        elif command.startswith("/"):
            print(printable(f"no command {command}; {_HELP}"), file=sys.stderr)
        else:
            try:
                _turn(conversation, chat, sampler, line, options)
            except FomoeError as error:  # the question is not part of the conversation, which goes on
                print(f"fomoe-run: {error}", file=sys.stderr)
            keep_profile(engine)  # now: AMD's runtime aborts the process when its device is lost
    if options.json:
        write_json(options.json, engine.statistics())


def _turn(conversation: Conversation, chat: Chat, sampler: Sampler, line: str, options: argparse.Namespace) -> None:
    tokens = chat.ask(line)
    if len(tokens) >= conversation.session.context_tokens:
        print(
            f"the conversation has filled the context of {conversation.session.context_tokens} tokens: "
            "/reset, or start with a larger -c",
            file=sys.stderr,
        )
        return
    answer = Answer()
    _generate(conversation, tokens, sampler, answer, options)
    chat.answered(line, tokens, answer)


@contextmanager
def _last_words(engine: Engine, options: argparse.Namespace) -> Iterator[None]:
    """Keep the profile and print the statistics, also when a signal ends the run."""
    failed = True
    try:
        yield
        failed = False
    except KeyboardInterrupt:
        failed = False
        raise
    finally:
        keep_profile(engine)
        if not failed and not options.quiet:
            print(format_footer(engine.statistics()), file=sys.stderr)


def run(argv: Sequence[str] | None = None) -> int:
    """The command without its error handling."""
    options = parser().parse_args(argv)
    check_targets([options.json])
    path, prompt = model_path(options), _prompt(options)
    config = replace(engine_config(options), profile=None if options.no_profile else options.profile or "learned")
    options.interactive = prompt is None
    _sampling(options)  # a mistake there should not cost the loading
    with Engine.open(path, config) as engine:
        if not options.quiet:
            print("\n".join(format_banner(engine)), file=sys.stderr)
        with _last_words(engine, options):
            if prompt is None:
                _interactive(engine, options)
            else:
                _one_shot(engine, prompt, options)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fomoe-run`."""
    return run_command("fomoe-run", run, argv)


if __name__ == "__main__":
    sys.exit(commands.run())
