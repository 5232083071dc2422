"""Every option of llama-cli (b11434, and of its sibling llama-completion): honoured, noted or explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fomoe_io.cli import run, serve
from fomoe_io.cli.parser import Parser

TABLE = [line.split("\t") for line in Path(__file__).with_name("llama_cli_b11434.tsv").read_text().splitlines()]
OPTIONS = [
    (wanted, name)
    for wanted, line in TABLE
    for name in re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*(?=[, ]|$)", re.split(r" [<\[{]", line)[0])
]
PARSER = run.parser()


def outcome(parser: Parser, name: str) -> str:
    """What the parser does with an option, found by giving it."""
    if name in parser._option_string_actions:
        return "honoured"
    option = parser.foreign[name]
    words = [name, *["7"] * (int(option.values) if option.values.isdecimal() else 0)]
    try:
        notes = parser.parse_args(["model.gguf", *words]).notes
    except SystemExit as stop:
        assert stop.code == 2
        return "explained"
    assert len(notes) == 1 and notes[0].startswith(f"{name} has no effect: ")
    return "noted"


def test_the_table_is_the_whole_list() -> None:
    assert len(TABLE) == 217 and len(OPTIONS) > 320
    assert {wanted for wanted, _ in TABLE} == {"honoured", "noted", "explained", "explained/noted"}


@pytest.mark.parametrize(("wanted", "name"), OPTIONS, ids=[name for _, name in OPTIONS])
def test_none_is_unknown(wanted: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = outcome(PARSER, name)
    assert found in wanted.split("/")
    if found == "explained":
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 2 and err[0].startswith(f"fomoe-run: {name}: ") and err[1].startswith("  fix: ")


@pytest.mark.parametrize("name", ["-ngl", "-fa", "-ctk", "-np", "-cmoe", "--mlock", "-ub", "-t", "-c", "-hf", "-rea"])
def test_the_server_knows_them_too(name: str) -> None:
    parser = serve.parser()
    assert name in parser._option_string_actions or parser.foreign[name].hint is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-ngl99", "did you mean -ngl"),
        ("-n12", "did you mean -n 12?"),
        ("-t4", "did you mean -t 4?"),
        ("--n-predit 5", "did you mean --n-predict?"),
        ("--prom x", "did you mean --prompt?"),
        ("--gpu-layer 5", "did you mean --gpu-layers?"),
        ("--zzzzzz", "fomoe-run --help lists the options"),
        ("model.gguf Hello there", '-p "Hello there"'),
    ],
)
def test_what_was_meant(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        PARSER.parse_args(words.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 2


def test_no_option_swallows_the_rest_of_a_word() -> None:
    options = PARSER.parse_args(["-st", "-sys", "be kind", "-p", "-n is what?", "--top_k", "5", "-n", "-1", "m.gguf"])
    assert options.single_turn and options.system == "be kind" and options.prompt == "-n is what?"
    assert options.top_k == 5 and options.predict == -1 and options.model == "m.gguf" and options.notes == []


@pytest.mark.parametrize(
    ("words", "value"),
    [(["-fa", "on"], ["-fa"]), (["-fa"], ["-fa"]), (["--mirostat", "0"], ["--mirostat"])],
)
def test_harmless_values(words: list[str], value: list[str]) -> None:
    assert [note.split()[0] for note in PARSER.parse_args(["m.gguf", *words]).notes] == value
    assert PARSER.parse_args([*words, "models/m.gguf"]).model == "models/m.gguf"


def test_optional_values() -> None:
    assert (
        PARSER.parse_args(["--color", "m.gguf"]).color == "on" and PARSER.parse_args(["--color", "off"]).color == "off"
    )
    assert PARSER.parse_args(["-rea", "off"]).reasoning == "off" and PARSER.parse_args([]).reasoning == "auto"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-n"], "-n needs a value: -n N"),
        (["-p", "--"], "-p needs a value"),
        (["-n", "many"], "'many' is no whole number"),
        (["--temp", "nan"], "nan is no number"),
        (["--ram", "16"], "16 bytes are no memory; try 16G"),
        (["--quiet=3"], "--quiet takes no value"),
        (["-dev", "tpu"], "'tpu' names no device"),
    ],
)
def test_values_that_are_none(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        PARSER.parse_args(words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("given", "meant"), [("none", "cpu"), ("CUDA0", "cuda:0"), ("ROCm1", "hip:1"), ("hip", "hip")])
def test_devices_as_llama_cpp_calls_them(given: str, meant: str) -> None:
    assert PARSER.parse_args(["-dev", given]).device == meant


@pytest.mark.parametrize("columns", ["20", "80", "200"])
def test_help_fits(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.__stdout__", None)
    text = run.parser().format_help()
    options = text.split("examples:")[0].splitlines()
    if columns != "20":  # names are longer than that
        assert max(map(len, options)) <= min(int(columns), 120)
    assert "default: 0.95" in " ".join(text.split()) and "examples:" in text and "fomoe-run MODEL.gguf" in text
    for group in ("model:", "prompt and answer:", "conversation:", "sampling", "memory and machine", "experts ("):
        assert f"\n{group}" in text.replace("\n  ", "\n") or columns == "20"
