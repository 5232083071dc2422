"""Completion scripts for shells, and man pages: both from the parsers of the commands."""

from __future__ import annotations

import argparse
import datetime
import re
from importlib import import_module
from typing import Any

from fomoe_io.cli.parser import Parser, package_version
from fomoe_io.errors import UsageError

COMMANDS = {
    "fomoe-run": "fomoe_io.cli.run:parser",
    "fomoe-serve": "fomoe_io.cli.serve:parser",
    "fomoe-ppl": "fomoe_io.cli.ppl:parser",
    "fomoe-doctor": "fomoe_io.cli.doctor:parser",
    "fomoe-top": "fomoe_io.cli.top:parser",
    "fomoe-layout": "layout_tool.main:parser",
    "fomoe-bench": "fomoe_io.cli.bench:parser",
}
"""Where each command's parser is."""
SHELLS = ("bash", "zsh", "fish")


def parser_of(command: str) -> Parser:
    """A command's parser."""
    module, function = COMMANDS[command].split(":")
    found: Parser = getattr(import_module(module), function)()
    return found


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Its commands, where it has some."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [a for a in parser._actions if a.option_strings and a.help is not argparse.SUPPRESS]


def _words(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in _options(parser) for name in action.option_strings]


def script(shell: str) -> str:
    """A script for a shell to source; it completes options, their choices, commands and files.

    Raises
    ------
    UsageError
        No such shell.
    """
    if shell not in SHELLS:
        raise UsageError(f"no completion for {shell}", hint=f"one of {', '.join(SHELLS)}")
    return _fish() if shell == "fish" else _bash(shell)


def _bash(shell: str) -> str:
    lines = ["# fomoe_io: source this, or put it into the shell's folder of completions"]
    if shell == "zsh":
        lines.append("autoload -U +X bashcompinit && bashcompinit")
    for command in COMMANDS:
        parser = parser_of(command)
        verbs = verbs_of(parser)
        function = f"_{command.replace('-', '_')}"
        lines += [f"{function}() {{", '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"']
        lines += ['    local words="" values=""', '    case "${COMP_WORDS[1]}" in']
        for verb, sub in verbs.items():
            lines.append(f'    {verb}) words="{" ".join(_words(sub))}" ;;')
        lines += [f'    *) words="{" ".join([*verbs, *_words(parser)])}" ;;', "    esac", '    case "$before" in']
        for action in _options(parser):
            if action.choices:
                lines.append(f'    {"|".join(action.option_strings)}) values="{" ".join(map(str, action.choices))}" ;;')
        lines += [
            "    esac",
            '    if [[ -n "$values" ]]; then COMPREPLY=($(compgen -W "$values" -- "$word"))',
            '    elif [[ "$word" == -* || ( $COMP_CWORD -eq 1 && -n "' + " ".join(verbs) + '" ) ]]; then',
            '        COMPREPLY=($(compgen -W "$words" -- "$word"))',
            '    else COMPREPLY=($(compgen -f -- "$word")); fi',
            "}",
            f"complete -o filenames -F {function} {command}",
        ]
    return "\n".join(lines)


def _fish() -> str:
    lines = ["# fomoe_io: into ~/.config/fish/completions"]
    for command in COMMANDS:
        parser = parser_of(command)
        for verb, sub in verbs_of(parser).items():
            lines.append(f"complete -c {command} -n __fish_use_subcommand -f -a {verb}")
            lines += [
                _fish_line(command, action, f"-n '__fish_seen_subcommand_from {verb}'") for action in _options(sub)
            ]
        lines += [_fish_line(command, action) for action in _options(parser)]
    return "\n".join(lines)


def _fish_line(command: str, action: argparse.Action, when: str = "") -> str:
    names = []
    for name in action.option_strings:
        flag = "-l" if name.startswith("--") else "-s" if len(name) == 2 else "-o"
        names.append(f"{flag} {name.lstrip('-')}")
    takes = "" if action.nargs == 0 else f"-xa '{' '.join(map(str, action.choices))}'" if action.choices else "-r"
    about = re.sub(r"['\\]", "", _help_of(action)).partition(";")[0]
    return " ".join(filter(None, [f"complete -c {command}", when, *names, takes, f"-d '{about[:80]}'"]))


def _help_of(action: argparse.Action) -> str:
    values = {**vars(action), "prog": "", "default": action.default}
    return (action.help or "") % values if action.help else ""


# ---- man pages ----


def man_page(command: str) -> str:
    """A command's page in man's own language, from its help."""
    parser = parser_of(command)
    date = datetime.date.today().isoformat()
    lines = [
        f'.TH {command.upper()} 1 "{date}" "fomoe_io {package_version()}" "User commands"',
        ".SH NAME",
        rf"{_roff(command)} \- {_roff((parser.description or '').split('.')[0])}",
        ".SH SYNOPSIS",
        rf".B {_roff(command)}",
        "[options]",
        ".SH DESCRIPTION",
        _roff(parser.description or ""),
    ]
    for verb, sub in verbs_of(parser).items():
        lines += [f".SH {_roff(command.upper())} {verb.upper()}", _roff(sub.description or ""), *_roff_options(sub)]
    lines += [".SH OPTIONS", *_roff_options(parser)]
    if parser.epilog:
        lines += [".SH EXAMPLES", ".nf", *map(_roff, parser.epilog.splitlines()[1:]), ".fi"]
    lines += [".SH EXIT STATUS", "0; 1 a mistake or fault; 2 the command line; 130 Ctrl\\-C; 143 SIGTERM; 129 SIGHUP."]
    return "\n".join(lines) + "\n"


def _roff_options(parser: argparse.ArgumentParser) -> list[str]:
    lines = []
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help is not argparse.SUPPRESS]
        actions = [a for a in actions if not isinstance(a, argparse._SubParsersAction)]
        if actions:
            lines.append(f".SS {_roff(group.title or '')}")
        for action in actions:
            names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            value = f" {action.metavar or ''}" if action.option_strings and action.nargs != 0 else ""
            lines += [".TP", rf"\fB{_roff(names)}\fR{_roff(value)}", _roff(_help_of(action)) or r"\&"]
    return lines


def _roff(text: str) -> str:
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{escaped}" if escaped.startswith((".", "'")) else escaped
