"""fomoe-bench cache and the importer of other programs' traces."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Tiers
from fomoe_io.cli.bench import main as bench
from fomoe_io.errors import FormatError
from fomoe_io.trace.importers import open_trace
from fomoe_io.trace.simulator import belady, even_slots, single_tokens

COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"
HEADER = """# route_trace v1
# model=/x/Some-MoE.gguf arch=some n_layer=3 n_expert=16 n_expert_used=2
# layer=1 expert_bytes=4096 dense_bytes=9
"""


@pytest.fixture(scope="module")
def trace(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "demo.trace"
    tokens = np.random.default_rng(41).integers(0, 8000, 120)
    with Engine.open(demo_model, EngineConfig(context_tokens=128, tiers=Tiers(0.25, 0.25), trace=path)) as engine:
        session = engine.session()
        session.prefill(tokens[:60])
        for token in tokens[60:].tolist():
            session.decode(token)
    return path


def test_the_tables(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["cache", str(trace), "--slots", "8,16", "--json", str(tmp_path / "j")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "120 tokens in 61 batches" in lines[0]
    table = {line.split()[0]: [float(v) for v in line.split()[1:]] for line in lines[3:]}
    assert list(table) == ["lru", "lfu", "lfru", "decayed", "belady"] and lines[2].split() == ["slots", "25%", "50%"]
    assert all(table[name][i] <= table["belady"][i] for name in table for i in (0, 1))
    rows = json.loads((tmp_path / "j").read_text())["rows"]
    assert len(rows) == 10 and {row["counters"]["requests"] for row in rows} == {120 * 8 * 4}
    bound = belady(open_trace(trace), even_slots(open_trace(trace), 0, 0.25))
    assert table["belady"][0] == pytest.approx(100 * (1 - bound.share(2)), abs=0.006)

    assert bench(["cache", str(trace), "--tiers", "vram=25%,dram=25%", "--single"]) == 0
    out = capsys.readouterr().out
    assert "in 120 batches" in out and "static" in out
    sums = [sum(map(float, line.split()[1:4])) for line in out.splitlines()[3:-1]]
    assert sums == pytest.approx([100] * 5, abs=0.02)


def test_traces_of_one_name(trace: Path, tmp_path: Path) -> None:
    """Two runs keep their traces under the same name in two folders: their rows must not be taken for one."""
    (tmp_path / "b").mkdir()
    other = Path(shutil.copy(trace, tmp_path / "b"))
    third = Path(shutil.copy(trace, tmp_path / "third"))
    traces = [str(trace), str(other), str(third)]
    assert bench(["cache", *traces, "--slots", "8", "--policy", "lru", "--json", str(tmp_path / "j")]) == 0
    rows = json.loads((tmp_path / "j").read_text())["rows"]
    assert [row["trace"] for row in rows] == [str(trace), str(other), "third"]


def test_the_plot(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.png"
    arguments = ["cache", str(trace), "--sizes", "20%,40%", "--policy", "lru,belady", "--plot", str(picture)]
    assert bench(arguments) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [picture]
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    capsys.readouterr()
    assert bench(arguments) == 1
    assert capsys.readouterr().err == "fomoe-bench cache: plots need matplotlib\n  fix: pip install 'fomoe_io[plot]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "does not exist"),
        (["TRACE", "--policy", "magic"], "'magic' is no policy"),
        (["TRACE", "--policy", "static"], "two tiers"),
        (["TRACE", "--slots", "0"], "from 1 to the 32"),
        (["TRACE", "--slots", "33"], "from 1 to the 32"),
        (["TRACE", "--tiers", "vram=1%,dram=1%", "--plot", "x.png"], "one size"),
        (["TRACE", "--decay", "1,0.9,0.2"], "is no decay"),
        (["TRACE", "TRACE"], "was named twice"),
        (["TRACE", "--json", "/"], "Is a directory"),
        (["TRACE", "--plot", "/nowhere/x.png"], "No such file"),
    ],
)
def test_mistakes(trace: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["cache", *(str(trace) if a == "TRACE" else a for a in arguments)]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) <= 2


def test_bad_words_are_usage_errors(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("--sizes", "120%"), ("--decay", "x"), ("--tiers", "x")):
        with pytest.raises(SystemExit) as caught:
            bench(["cache", str(trace), option, value])
        assert caught.value.code == 2 and option in capsys.readouterr().err


def route_trace(random: np.random.Generator) -> tuple[str, np.ndarray]:
    """A prompt of 5 tokens (the last layer: 1) and 7 steps, 3 layers; and the picks of layer 0."""
    rows, first = [], []
    for phase, steps in ((0, 5), (1, 7)):
        for layer in range(3):
            for step in range(steps):
                if phase == 0 and layer == 2 and step < 4:
                    continue
                picks = random.choice(16, 2, replace=False)
                first += [picks] if layer == 0 else []
                rows += [f"0,{phase},{step},{layer},{slot},{e},0.5,1,4096" for slot, e in enumerate(picks)]
    return HEADER + COLUMNS + "\n" + "\n".join(rows) + "\n", np.array(first)


def test_route_traces(tmp_path: Path) -> None:
    text, picks = route_trace(np.random.default_rng(43))
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "a.csv.xz").write_bytes(lzma.compress(text.encode()))
    for name in ("a.csv", "a.csv.xz"):
        trace = open_trace(tmp_path / name)
        assert trace.batch_tokens.tolist() == [5] + [1] * 7 and trace.layers[2].tokens.tolist() == [1] * 8
        np.testing.assert_array_equal(trace.layers[0].picks, picks)
        assert trace.header.model == "Some-MoE.gguf" and trace.header.expert_bytes == (0, 4096, 0)
        assert single_tokens(trace).layers[2].tokens.tolist() == [0, 0, 0, 0] + [1] * 8
    assert bench(["cache", str(tmp_path / "a.csv.xz"), "--sizes", "25%"]) == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_expert=16", "n_expert=0", "make no sense"),
        ("n_expert_used=2", "n_expert_used=99", "make no sense"),
        ("# model=", "# mode=", "no line"),
        (COLUMNS, "a,b", "columns"),
        (",0.5,1,4096\n", ",0.5,1\n", "nine numbers"),
        ("0,1,3,1,1,", "0,1,3,1,0,", "2 picks"),
        ("0,1,3,1,1,", "0,1,3,9,1,", "lacks"),
        (",0.5,1,", ",nan,1,", "lacks"),
        ("0,1,3,1,1,", "0,1,nan,1,1,", "counts nothing"),
        ("0,1,3,1,1,", "1e300,1,3,1,1,", "counts nothing"),
        (",0.5,1,", ",x,1,", "nine numbers"),
    ],
)
def test_damaged_route_traces(tmp_path: Path, old: str, new: str, message: str) -> None:
    text, _ = route_trace(np.random.default_rng(44))
    assert old in text
    (tmp_path / "a.csv").write_text(text.replace(old, new, 1))
    with pytest.raises(FormatError, match=message) as caught:
        open_trace(tmp_path / "a.csv")
    assert "\n" not in caught.value.message


def test_damaged_xz(tmp_path: Path) -> None:
    text, _ = route_trace(np.random.default_rng(45))
    data = lzma.compress(text.encode())
    (tmp_path / "cut.xz").write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match="cut off"):
        open_trace(tmp_path / "cut.xz")
    (tmp_path / "other.xz").write_bytes(lzma.compress(b"hello"))
    with pytest.raises(FormatError, match="no line"):
        open_trace(tmp_path / "other.xz")


def test_the_shared_traces(shared: Path) -> None:
    """Those of other programs that lie beside the checkout: their tokens and picks, as their README counts them."""
    for name, layers, decoded, prompt, used in (
        ("qwen", 48, 128, 28, 6),
        ("gemma", 30, 128, 29, 6),
        ("gptoss", 36, 64, 85, 2),
    ):
        trace = open_trace(shared / "data" / "routing" / f"bigmoeonedge-{name}.route.csv.xz")
        assert len(trace.layers) == layers and trace.header.used == used
        assert trace.batch_tokens.tolist() == [prompt] + [1] * decoded
