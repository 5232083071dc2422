"""Questions and answers: one, or as many as the user has, with the commands between them."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from fomoe_io.cli.chat import Answer, Chat
from fomoe_io.cli.common import Terminated, decoded
from fomoe_io.cli.grammar_options import AnswerGrammar
from fomoe_io.cli.kept_profile import keep_profile
from fomoe_io.cli.progress import PromptProgress
from fomoe_io.cli.report import Report
from fomoe_io.cli.ui import AnswerWriter, aside, typing_is_silent
from fomoe_io.cli.watch import StatusLine
from fomoe_io.engine import Engine
from fomoe_io.errors import FomoeError, UsageError
from fomoe_io.stats import format_footer
from fomoe_io.text.generation import Conversation
from fomoe_io.text.sampler import Sampler, SamplingConfig

HELP = """\
/help           this list
/stats          statistics so far
/regen          another answer to the last question
/reset, /clear  forget the conversation
/save FILE      write the conversation
/load FILE      go on with one that was saved
/read FILE      put a text file before the next question
/think on|off   let the model think, or not (auto: as its template does)
/exit           leave, as Ctrl-D
Alt-Enter starts a new line; a pasted text keeps its lines.
Ctrl-C stops an answer, clears a half-typed line, and leaves at an empty one."""

LONG_TOKENS = 256
"""Worth a word when they are read again."""
ROOM_TOKENS = 256
"""For an answer, in the context that is suggested."""


def too_long(tokens: int, context: int, predict: int, trained: int) -> UsageError:
    """Of a prompt that leaves no room for an answer; the context that is suggested has some."""
    return UsageError(
        f"{tokens} tokens of a prompt and an answer exceed the context of {context}",
        hint=f"-c {tokens + max(predict, ROOM_TOKENS)} (the model was trained on {trained})",
    )


class Talk:
    """One run's conversation.

    Parameters
    ----------
    engine : Engine
    chat : Chat
    sampling : SamplingConfig
    options : argparse.Namespace
    report : Report
    copy : TextIO or None
        Where --output wants the answers.
    """

    def __init__(
        self,
        engine: Engine,
        chat: Chat,
        sampling: SamplingConfig,
        options: argparse.Namespace,
        report: Report,
        copy: TextIO | None = None,
    ) -> None:
        self._engine = engine
        self.chat = chat
        self._options = options
        self._report = report
        self._copy = copy
        self._sampler = Sampler(sampling)
        self._grammar = AnswerGrammar(engine, options.form)
        self._conversation = Conversation(engine.timeline(lambda text: self._say(f"note: {text}")))
        self._progress = PromptProgress(engine, quiet=options.quiet)
        self._put_before = ""
        self._is_interactive = False

    def _say(self, text: str) -> None:
        """A remark, unless nothing is to be said."""
        if not self._options.quiet:
            aside(text, self._options.color)

    def greet(self) -> None:
        """What to know before the first question."""
        if self.chat.template is None and not self._options.raw:
            self._say("this model has no chat template: it continues your text (/help for commands)")
        else:
            self._say("/help lists the commands")

    # ---- one answer ----

    def tokens_of(self, text: str) -> list[int]:
        """Of the conversation with this question.

        Raises
        ------
        UsageError
            There are none, or so many that the context has no room for an answer.
        """
        tokens = self.chat.ask(text)
        if not tokens:
            raise UsageError("the prompt is empty", hint='-p "Once upon a time"')
        context = self._engine.context_tokens
        if len(tokens) >= context:
            raise too_long(len(tokens), context, self._options.predict, self._engine.shape.context_tokens)
        return tokens

    def answer(self, tokens: list[int]) -> Answer:
        """Generate and print; Ctrl-C keeps what there is, and only stops an interactive answer."""
        answer = Answer()
        writer = AnswerWriter(
            self._options.color, is_thinking=self.chat.is_thinking, copy=self._copy, is_mute=self._options.is_mute
        )
        try:
            with typing_is_silent(), StatusLine(self._engine, is_on=self._options.watch) as status:
                self._generate(tokens, answer, writer, status)
            answer.stop_reason = self._conversation.stop_reason
        except KeyboardInterrupt as ended:
            if not self._is_interactive or isinstance(ended, Terminated):
                raise
            print(" [stopped]", end="", file=sys.stderr)
        finally:
            self._progress.end()
            writer.end()
            self._report.answered(answer, self._sampler)
        return answer

    def _generate(self, tokens: list[int], answer: Answer, writer: AnswerWriter, status: StatusLine) -> None:
        options, conversation = self._options, self._conversation
        unread = conversation.unread(tokens)
        if unread == len(tokens) > LONG_TOKENS and self.chat.turns:
            why = "" if options.reasoning_preserve else " (--reasoning-preserve keeps thoughts in it)"
            self._say(f"reading all {unread} tokens again: the history is not what was read before{why}")
        self._sampler.constraint = self._grammar.start(self.chat)
        self._progress.begin(unread)
        for token, text in conversation.generate(
            tokens, self._sampler, most=options.predict, stops=options.stop, ignore_eos=options.ignore_eos,
            progress=self._progress, turn=self.chat.turn,
        ):  # fmt: skip
            if not answer.ids:
                self._progress.end()
            if token >= 0:
                answer.ids.append(token)
            answer.pieces.append(text)
            writer.write(text)
            status.update()

    # ---- many ----

    def run(self, first: str | None = None) -> None:
        """Answer until the user leaves, beginning with a question that is there already."""
        from fomoe_io.cli import prompt

        self._is_interactive = True
        if first is not None:
            self._ask(first)
        while not (self._options.single_turn and self._turns):
            line = prompt.read_line()
            if line is None or line.strip() in ("/exit", "/quit"):
                break
            if line.strip().startswith("/") and not line.strip().startswith("//"):
                self._command(line.strip())
            elif line.strip():
                self._ask(line)

    _turns = 0

    def _ask(self, line: str) -> None:
        """A turn.  What goes wrong is said, and is no part of the conversation, which goes on."""
        try:
            self._guarded(lambda: self._turn(line))
            keep_profile(self._engine)  # now: AMD's runtime aborts the process when its device is lost
        except KeyboardInterrupt as ended:  # just before or after the answer
            if isinstance(ended, Terminated):
                raise

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except FomoeError as error:
            print(f"fomoe-run: {error}", file=sys.stderr)
        except MemoryError:
            print("fomoe-run: out of memory for this question\n  fix: a smaller -b or -c", file=sys.stderr)
        except BrokenPipeError:
            raise
        except OSError as error:
            aside(f"fomoe-run: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", "off")

    def _turn(self, line: str) -> None:
        text, context = self._put_before + line, self._engine.context_tokens
        tokens = self.chat.ask(text)
        if len(tokens) >= context:
            raise UsageError(
                f"the conversation has filled the context of {context} tokens: with this question it has {len(tokens)}",
                hint=f"/reset, a shorter question, or start with -c {len(tokens) + ROOM_TOKENS}",
            )
        before = self._engine.statistics()
        answer = self.answer(tokens)
        self._put_before = ""
        self._turns += 1
        if answer.ids or answer.stop_reason != "interrupted":
            self.chat.answered(text, tokens, answer)
        self._tell_end(answer, len(tokens), before)

    def _tell_end(self, answer: Answer, prompt_tokens: int, before: dict[str, float]) -> None:
        context, most = self._engine.context_tokens, self._options.predict
        if answer.stop_reason == "context":
            self._say(f"the context of {context} tokens is full: the answer ends here (/reset, or a larger -c)")
        if answer.stop_reason == "limit":
            self._say(f"-n {most} is reached: the answer ends here")
        if self._options.show_timings:
            now = self._engine.statistics()
            speeds = []
            for what, count, seconds in (
                ("prompt", "prompt_tokens", "prompt_seconds"), ("gen", "generated_tokens", "decode_seconds")
            ):  # fmt: skip
                tokens, time = now[count] - before[count], now[seconds] - before[seconds]
                shown = len(answer.ids) if what == "gen" else tokens
                speeds.append(f"{what} {shown} tok {tokens / time if time > 0 else 0:.1f} tok/s")
            self._say(f"[{'   '.join(speeds)}   context {prompt_tokens + len(answer.ids)} of {context}]")

    # ---- commands ----

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: aside(HELP, "off"),
            "/stats": lambda _: print(format_footer(self._engine.statistics()), file=sys.stderr),
            "/reset": self._reset,
            "/clear": self._reset,
            "/regen": self._regenerate,
            "/save": self._save,
            "/load": self._load,
            "/read": self._read,
            "/think": self._think,
        }
        if name not in commands:
            aside(f"no command {name}: /help lists them; // at the start of a line is a question's /", "off")
            return
        self._guarded(lambda: commands[name](rest.strip()))

    def _reset(self, _: str) -> None:
        self.chat.reset()
        self._conversation.reset()
        self._sampler.reset()
        self._put_before = ""
        self._say("the conversation is forgotten")

    def _regenerate(self, _: str) -> None:
        question = self.chat.take_back()
        if question is None:
            raise UsageError("there is no answer to generate again")
        self._ask(question)

    def _save(self, text: str) -> None:
        path = _one_path(text, "/save")
        self.chat.save(path)
        aside(f"{self.chat.turns} answers saved in {path}", self._options.color)

    def _load(self, text: str) -> None:
        path = _one_path(text, "/load")
        self.chat.load(path)
        aside(f"{self.chat.turns} answers loaded from {path}", self._options.color)

    def _read(self, text: str) -> None:
        path = _one_path(text, "/read")
        found = decoded(path.read_bytes())
        self._put_before += f"--- File: {path.name} ---\n{found}\n"
        aside(f"{path}: {len(found)} characters go before the next question", self._options.color)

    def _think(self, text: str) -> None:
        if text not in ("on", "off", "auto"):
            raise UsageError("/think takes on, off or auto")
        self.chat.thinking = {"on": True, "off": False, "auto": None}[text]
        aside(f"thinking is {text}", self._options.color)


def _one_path(text: str, command: str) -> Path:
    try:
        words = shlex.split(text)
    except ValueError:
        words = [text]
    if len(words) != 1:
        raise UsageError(f"{command} takes one file", hint=f"{command} FILE")
    return Path(words[0]).expanduser()
