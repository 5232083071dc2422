"""fomoe-ppl: step by step, against the exact run, and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig
from fomoe_io.cli import ppl
from fomoe_io.trace.exact_logits import ExactLogits

TIERS = ["--tiers", "vram=20%,dram=15%"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(
        "The river ran through the valley, and the old road beside it; nobody had walked there for years. " * 30
    )
    return path


def measure(model: Path, text: Path, *options: str, chunks: int = 3) -> dict[str, Any]:
    """What --json has."""
    result = text.with_name("result.json")
    command = [str(model), "-f", str(text), "-c", "64", "--chunks", str(chunks), "--json", str(result), *options]
    assert ppl.main(command) == 0
    saved: dict[str, Any] = json.loads(result.read_text())
    return saved


def test_stepwise_is_as_exact_as_batches(demo_model: Path, text: Path) -> None:
    batches, steps = measure(demo_model, text), measure(demo_model, text, "--stepwise", *TIERS)
    assert (batches["ppl"], batches["ppl_error"]) == (steps["ppl"], steps["ppl_error"])
    assert batches["tokens_scored"] == 3 * 31
    assert steps["shares"]["nvme"] > 0 and steps["shares"]["substituted"] == 0
    assert steps["expert_requests"] == 3 * 63 * 8 * 4


def test_divergence_against_numpy() -> None:
    random = np.random.default_rng(1)
    exact, other = random.standard_normal((2, 5, 40)).astype(np.float32) * 3
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(1, keepdims=True) for x in (exact, other))
    found = [ppl.divergence(*rows) for rows in zip(exact, other, strict=True)]
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(1), rtol=1e-9)
    assert max(ppl.divergence(row, row) for row in exact) < 1e-12 and min(found) > 0
    targets = np.array([0, 39, 5, 7, 7])
    scores = [ppl.score(*pair) for pair in zip(exact, targets, strict=True)]
    np.testing.assert_allclose(scores, -np.log(p[np.arange(5), targets]), rtol=1e-9)


def test_cache_aware_routing_is_held_against_the_exact_run(
    demo_model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = measure(demo_model, text)
    found = measure(demo_model, text, "--car", "ratio:0.3", *TIERS)
    out = capsys.readouterr().out
    assert f"exact PPL = {plain['ppl']:.4f}" in out and f"KL = {found['kl_vs_exact']:.5f}" in out
    assert out.splitlines()[-1] == f"Final estimate: PPL = {found['ppl']:.4f} +/- {found['ppl_error']:.5f}"
    assert found["ppl_exact"] == pytest.approx(plain["ppl"], rel=1e-12)
    assert found["ppl_increase"] == pytest.approx(found["ppl"] / plain["ppl"] - 1)
    assert 0 < found["ppl_increase_error"] < found["ppl_error"] / found["ppl"]
    assert found["kl_vs_exact"] > 0 and found["shares"]["substituted"] > 0 and not found["exact"]
    shares = found["shares"]
    assert shares["vram"] + shares["dram"] + shares["nvme"] + shares["substituted"] == pytest.approx(1)
    # from the first token on: every token went through the cache, one by one
    assert found["expert_requests"] == 3 * 63 * 8 * 4 and found["cold_starts"] == 1
    nothing = measure(demo_model, text, "--car", "regret:0", *TIERS)
    assert nothing["kl_vs_exact"] < 1e-12 and nothing["ppl"] == plain["ppl"]


def test_it_resumes(demo_model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ["--exact-logits", str(text.with_name("exact")), "--resume", str(text.with_name("resume"))]
    options = ["--car", "ratio:0.3", *TIERS, *kept]
    first = measure(demo_model, text, *options, chunks=2)
    size = text.with_name("exact").stat().st_size
    assert measure(demo_model, text, *options, chunks=2)["ppl"] == first["ppl"]
    assert text.with_name("exact").stat().st_size == size
    capsys.readouterr()
    more = measure(demo_model, text, *options, chunks=4)
    assert capsys.readouterr().out.startswith("[3]")
    assert more["cold_starts"] == 2 and more["tokens_scored"] == 2 * first["tokens_scored"]
    assert ppl.main([str(demo_model), "-f", str(text), "-c", "64", "--car", "ratio:0.9", *TIERS, *kept]) == 1
    assert "other settings" in capsys.readouterr().err
    assert ppl.main([str(demo_model), "-f", str(text), "-c", "32", "--car", "ratio:0.3", *TIERS, *kept]) == 1
    assert "chunk size" in capsys.readouterr().err
    assert ppl.main([str(demo_model), "-f", str(text), "-c", "64", *kept]) == 1
    assert "--car on" in capsys.readouterr().err


def complaint(capsys: pytest.CaptureFixture[str], model: Path, text: Path, *options: str) -> str:
    """The one line, and perhaps a fix, that a run ends in."""
    capsys.readouterr()
    assert ppl.main([str(model), "-f", str(text), "-c", "64", *options]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("fomoe-ppl: ", "  fix: "))]
    assert lines[0].startswith("fomoe-ppl: ") and len(lines) <= 2
    return "\n".join(lines)


@pytest.mark.parametrize("other", [["--tiers", "vram=10%,dram=15%"], ["--policy", "lru", *TIERS], []])
def test_shares_of_other_memory_are_not_mixed(
    demo_model: Path, text: Path, other: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    resume = ["--resume", str(text.with_name("resume"))]
    measure(demo_model, text, *TIERS, *resume, chunks=2)
    measure(demo_model, text, *TIERS, *resume, chunks=3)
    assert "other settings or memory" in complaint(capsys, demo_model, text, *other, *resume)


def test_damaged_resume_files(demo_model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = text.with_name("resume")
    resume = ["--resume", str(path), "--chunks", "2"]
    measure(demo_model, text, "--resume", str(path), chunks=1)
    saved = json.loads(path.read_text())
    chunk = saved["chunks"][0]
    hits = chunk["hits"]
    changes: list[dict[str, Any]] = [
        {"count": "31"}, {"count": 0}, {"count": 10**400}, {"nll": None}, {"nll": float("nan")}, {"nll": 1e9},
        {"nll_squared": 10**400}, {"hits": []}, {"hits": {}}, {"hits": hits | {"x": 1}}, {"hits": hits | {"dram": -1}},
        {"hits": dict.fromkeys(hits, 0)}, {"cold": 2},
    ]  # fmt: skip
    damaged = [json.dumps(saved | {"chunks": [chunk | change]}) for change in changes]
    for body in [*damaged, json.dumps(saved | {"chunks": 1}), json.dumps(saved | {"chunks": {"a": 1}}), "[" * 100_000]:
        path.write_text(body)
        assert "is no resume file" in complaint(capsys, demo_model, text, *resume), body[:300]
    path.write_text(json.dumps(saved))
    assert measure(demo_model, text, "--resume", str(path), chunks=2)["tokens_scored"] == 2 * 31


def test_nothing_to_score(demo_model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--chunks 0 leaves nothing" in complaint(capsys, demo_model, text, "--chunks", "0")
    text.write_text("A few words.")
    assert "a longer text" in complaint(capsys, demo_model, text)
    text.write_text("")
    assert "is empty" in complaint(capsys, demo_model, text)


@pytest.mark.parametrize("option", ["--json", "--trace", "--resume", "--exact-logits"])
def test_targets_are_refused_before_the_work(
    demo_model: Path, text: Path, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engine, "open", lambda *_: pytest.fail("the model was opened"))
    for bad in (str(text.parent), ".", "/"):
        assert "Is a directory" in complaint(capsys, demo_model, text, "--car", "on", option, bad)


def test_half_a_chunk_of_exact_logits_is_written_again(tmp_path: Path) -> None:
    path, logits = tmp_path / "exact", np.random.default_rng(1).random((3, 4, 10)).astype(np.float32)
    with ExactLogits(path, "print", 4, 10) as exact:
        exact.append(logits[0])
    with path.open("ab") as stream:
        stream.write(b"cut short")
    with ExactLogits(path, "print", 4, 10) as exact:
        assert exact.chunks == 1
        exact.append(logits[1])
        exact.append(logits[2])
        assert exact.chunks == 3
        assert all(np.array_equal(list(exact.rows(i)), logits[i]) for i in range(3))


def test_the_exact_run_is_not_counted(demo_model: Path, text: Path) -> None:
    found = measure(demo_model, text, "--car", "ratio:0.3", *TIERS, chunks=1)
    with Engine.open(demo_model, EngineConfig()) as engine:
        layers, used = engine.shape.layers, engine.shape.used
    assert found["expert_requests"] == 63 * layers * used and found["prompt_tokens"] == 0
