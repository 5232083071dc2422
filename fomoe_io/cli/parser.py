"""The parser of all commands: llama.cpp's habits, one line for a mistake, and what was probably meant.

A command line is read here, word by word, before argparse sees it: an option is its whole word (`-ngl` is no `-n gl`),
its value is the next word whatever that looks like (`-p "-- hello"`), and `--top_k` is `--top-k`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from fomoe_io.errors import UsageError, printable

NARROWEST, WIDEST = 20, 120
OPTIONAL = "?"
ONE = "1"
NONE = "0"


@dataclass(frozen=True, slots=True)
class Foreign:
    """An option of another program that users bring with them.

    Attributes
    ----------
    names : tuple of str
    values : {"0", "1", "2", "?"}
        How many words follow it; "?" is one that may be left out.
    why : str
        What is true here instead.
    hint : str or None
        What to give instead; an option without a hint is harmless: accepted, with a note.
    neutral : tuple of str
        Values that ask for nothing, and are accepted with a note where others are refused.
    """

    names: tuple[str, ...]
    values: str
    why: str
    hint: str | None = None
    neutral: tuple[str, ...] = ()


class _Help(argparse.HelpFormatter):
    """Defaults after each option, as wide as the terminal, examples as they were written."""

    def __init__(self, prog: str) -> None:
        width = min(max(_columns() - 2, NARROWEST), WIDEST)
        super().__init__(prog, max_help_position=min(30, max(4, width // 3)), width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"  # the value once, as llama.cpp's help has it

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.default not in (None, argparse.SUPPRESS, False, True, [], "") and "default" not in text
        return f"{text} (default: %(default)s)".strip() if shown and action.option_strings else text

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" not in text:
            return super()._fill_text(text, width, indent)
        return "\n".join(indent + line for line in text.splitlines())


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        return int(os.environ.get("COLUMNS", "") or 100) if os.environ.get("COLUMNS", "1").isdecimal() else 100


class Parser(argparse.ArgumentParser):
    """Options by their whole words; see the module.

    Parameters
    ----------
    prog, description : str
    examples : str
        Command lines, shown at the help's end.
    """

    def __init__(self, prog: str, description: str = "", *, examples: str = "", **more: Any) -> None:
        epilog = "examples:\n" + "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
        super().__init__(
            prog=prog, description=description, epilog=epilog if examples else None, allow_abbrev=False,
            formatter_class=_Help, add_help=False, **more,
        )  # fmt: skip
        self._foreign: dict[str, Foreign] = {}
        self._notes: list[str] = []
        self.add_argument("-h", "--help", "--usage", action="help", help="show this and exit")

    def add_foreign(self, options: Iterable[Foreign]) -> None:
        """Know these options of other programs, where this parser has none of that name."""
        for option in options:
            for name in option.names:
                if name not in self._option_string_actions:
                    self._foreign.setdefault(name, option)

    @property
    def foreign(self) -> dict[str, Foreign]:
        """By name."""
        return dict(self._foreign)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The options, with `notes`: what was accepted without effect."""
        self._notes.clear()
        options, extra = self.parse_known_args(args, namespace)
        if extra:
            prompt = "-p" in self._option_string_actions
            hint = f'-p "{" ".join(extra)}"' if prompt else ""
            self.refuse(f"unexpected argument {extra[0]!r}", hint)
        options.notes = list(self._notes)
        return options

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Of argparse, after the words were told apart."""
        return super().parse_known_args(self._plain(list(sys.argv[1:] if args is None else args)), namespace)

    def error(self, message: str) -> NoReturn:
        """A mistake on the command line: one line, exit code 2."""
        self.refuse(re.sub(r"^argument ([^:]*?)(?:, [^:]*)?: ", r"\1: ", message))

    def refuse(self, message: str, hint: str = "") -> NoReturn:
        """End with exit code 2, and with what helps."""
        fix = hint or f"{self.prog} --help lists the options"
        self.exit(2, f"{self.prog}: {message}\n  fix: {fix}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message("\n".join(printable(line) for line in message.split("\n")), file)

    # ---- words ----

    def _plain(self, words: list[str]) -> list[str]:
        """The words with each option and its value in one, `--name=value`, which argparse can't misread."""
        plain: list[str] = []
        while words:
            word = words.pop(0)
            if word == "--":
                return [*plain, word, *words]
            if not word.startswith("-") or word == "-":
                plain.append(word)
                if self._subparsers is not None:
                    return plain + words  # the rest belongs to a command of its own
                continue
            name, equals, value = self._named(word)
            given = [value] if equals else []
            if name in self._foreign:
                self._meet(name, given, words)
                continue
            action = self._option_string_actions.get(name)
            if action is None:
                self._unknown(word)
            plain.append(self._with_value(name, action, given, words))
        return plain

    def _named(self, word: str) -> tuple[str, str, str]:
        """(option, "=" or "", value): the option as it is spelled here, where it is known."""
        for name, equals, value in ((word, "", ""), word.partition("=")):
            for spelled in (name, f"--{name[2:].replace('_', '-')}", f"--{name[2:].replace('-', '_')}"):
                is_long = name.startswith("--") or spelled == name
                if is_long and (spelled in self._option_string_actions or spelled in self._foreign):
                    return spelled, equals, value
        return word, "", ""

    def _with_value(self, name: str, action: argparse.Action, given: list[str], words: list[str]) -> str:
        if action.nargs == 0:
            if given:
                self.refuse(f"{name} takes no value, and was given {given[0]!r}")
            return name
        choices = [str(choice) for choice in action.choices or ()]
        if not given and action.nargs == OPTIONAL and (not words or words[0] not in choices):
            return f"{name}={action.const}"
        if not given and not words:
            what = action.metavar or "a value"
            self.refuse(f"{name} needs {what if what == 'a value' else f'a value: {name} {what}'}")
        value = given[0] if given else words.pop(0)
        if value == "--":  # argparse would drop it
            self.refuse(f"{name} needs a value, and -- ends the options")
        return f"{name}={value}"

    def _meet(self, name: str, given: list[str], words: list[str]) -> None:
        option = self._foreign[name]
        if option.values == OPTIONAL:
            if not given and words and not words[0].startswith("-") and not _looks_like_model(words[0]):
                given.append(words.pop(0))
        else:
            while len(given) < int(option.values) and words:
                given.append(words.pop(0))
        is_neutral = bool(given) and given[0] in option.neutral
        if option.hint is not None and not is_neutral:
            self.refuse(f"{name}: {option.why}", option.hint)
        self._notes.append(f"{name} has no effect: {option.why}")

    def _unknown(self, word: str) -> NoReturn:
        hint = self._meant(word)
        self.refuse(f"unknown option {word}", f"did you mean {hint}?" if hint else "")

    def _meant(self, word: str) -> str:
        name = word.partition("=")[0]
        for length in range(len(name) - 1, 1, -1):  # -n12, -t4
            action = self._option_string_actions.get(name[:length])
            if not name.startswith("--") and action is not None and action.nargs != 0 and name[length:].isdecimal():
                return f"{name[:length]} {name[length:]}"
        shown = [n for n, a in self._option_string_actions.items() if a.help is not argparse.SUPPRESS]
        longer = [known for known in shown if len(name) > 3 and known.startswith(name)]
        if longer:
            return min(longer, key=len)
        bare = {known.lstrip("-").replace("_", "-"): known for known in (*self._foreign, *shown)}
        close = get_close_matches(name.lstrip("-").replace("_", "-"), bare, 1, cutoff=0.7)
        return bare[close[0]] if close else ""


def _looks_like_model(word: str) -> bool:
    return "/" in word or word.endswith(".gguf") or Path(word).exists()


def package_version() -> str:
    """Version of the installed package."""
    try:
        return version("fomoe_io")
    except PackageNotFoundError:
        return "unknown (not installed)"


def new_parser(program: str, description: str, examples: str = "") -> Parser:
    """A parser with --version."""
    parser = Parser(program, description, examples=examples)
    parser.add_argument(
        "--version", action="version", version=f"{program} {package_version()}", help="show the version and exit"
    )
    return parser


# ---- values ----


def checked(parse: Callable[[str], object]) -> Callable[[str], object]:
    """A parser whose UsageError argparse shows as its own message."""

    def convert(text: str) -> object:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error).replace("\n  fix:", "; try")) from None

    return convert


def whole(text: str) -> int:
    """An integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def number(text: str) -> float:
    """A number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if value != value:
        raise argparse.ArgumentTypeError("nan is no number")
    return value


def valid_text(text: str) -> str:
    """Of an argument or a terminal: bytes that are not UTF-8 come as lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def option_names(parser: argparse.ArgumentParser) -> Sequence[str]:
    """Every option that the help shows."""
    return [n for a in parser._actions if a.help is not argparse.SUPPRESS for n in a.option_strings]
