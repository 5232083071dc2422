"""The memory budget is the whole process's: its peak resident set stays below --ram."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fomoe_io.backend import Budgets
from fomoe_io.config import EngineConfig, Tiers
from fomoe_io.engine import Engine
from fomoe_io.errors import BudgetError, UsageError
from fomoe_io.system import memory

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: str, command: str = "run") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"fomoe_io.cli.{command}", *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def smallest(demo_model: Path) -> int:
    """Smallest budget that the error names, MiB."""
    result = run(str(demo_model), "-p", "x", "--ram", "1M", "-c", "512")
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and lines[1].startswith("  fix: --ram ")
    return int(lines[1].split()[-1].removesuffix("M"))


PROMPT = "The river ran through the valley, and the road beside it. " * 12


@pytest.fixture(scope="module")
def answer(demo_model: Path) -> list[int]:
    """The greedy answer where memory is no matter."""
    with Engine.open(demo_model, EngineConfig(context_tokens=512)) as engine:
        session, found = engine.session(), []
        logits = session.prefill(engine.tokenizer.encode(PROMPT, add_bos=engine.tokenizer.add_bos))
        for _ in range(40):
            found.append(int(logits.argmax()))
            logits = session.decode(found[-1])
    return found


@pytest.mark.parametrize("more", [0, 4, 16, 64])
def test_peak_stays_below(demo_model: Path, tmp_path: Path, smallest: int, more: int, answer: list[int]) -> None:
    statistics = tmp_path / "statistics.json"
    result = run(
        str(demo_model), "-p", PROMPT, "-n", "40", "-c", "512", "--temp", "0",
        "--ram", f"{smallest + more}M", "--json", str(statistics),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    values = json.loads(statistics.read_text())
    assert values["peak_rss_bytes"] <= (smallest + more) << 20
    assert values["budgets"]["ram_bytes"] == (smallest + more) << 20
    assert values["token_ids"] == answer
    if more == 0:
        assert values["budgets"]["slots_per_layer"] < 32
        assert values["tiers"]["nvme"]["hits"] > 0


KEEPING = """
import json, sys
from pathlib import Path
from fomoe_io import Engine, EngineConfig
ram, folder = int(sys.argv[2]) << 20, Path(sys.argv[3])
config = EngineConfig(ram_bytes=ram, context_tokens=1024, threads=1, cache_bytes="14M", cache_disk_bytes="40M",
    cache_folder=folder)
with Engine.open(sys.argv[1], config) as engine:
    timeline = engine.timeline()
    for number in (*range(6), *range(6)):
        tokens = timeline.begin([number + 5, *range(100, 700)])
        timeline.read(tokens[len(timeline.tokens):])
        timeline.end()
    kept = timeline.kept
    print(json.dumps([engine.statistics()["peak_rss_bytes"], kept.held_bytes, kept.folder.read_bytes]))
"""


def test_kept_sessions_are_within_the_budget(demo_model: Path, tmp_path: Path, smallest: int) -> None:
    ram = smallest + 14 + 8  # a longer context than there
    command = [sys.executable, "-c", KEEPING, str(demo_model), str(ram), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    peak, held, read = json.loads(done.stdout)
    assert peak <= ram << 20 and held > 4 << 20 and read > 0


@pytest.mark.parametrize("options", [["--car", "on"], []])
def test_peak_of_a_perplexity_stays_below(demo_model: Path, tmp_path: Path, options: list[str]) -> None:
    """A chunk's logits in float64, and those of the exact run, are several times what a budget leaves free."""
    text, statistics = tmp_path / "text", tmp_path / "statistics.json"
    text.write_text("The river ran through the valley, and the old road beside it. " * 45)
    command = [str(demo_model), "-f", str(text), "-c", "512", "--chunks", "1", "--json", str(statistics), *options]
    least = int(run(*command, "--ram", "1M", command="ppl").stderr.split()[-1].removesuffix("M"))
    result = run(*command, "--ram", f"{least}M", command="ppl")
    assert result.returncode == 0, result.stderr
    values = json.loads(statistics.read_text())
    assert values["tokens_scored"] == 255 and values["peak_rss_bytes"] <= least << 20


def test_one_below_the_smallest_is_refused(demo_model: Path, smallest: int) -> None:
    result = run(str(demo_model), "-p", "x", "-c", "512", "--ram", f"{smallest - 4}M")
    assert result.returncode == 1
    assert result.stderr.startswith("fomoe-run: a memory budget of ")
    assert "Traceback" not in result.stderr


# ---- slots follow from the configuration alone ----


def shared(model: Path, **options: object) -> Budgets:
    with Engine.open(model, EngineConfig(context_tokens=512, threads=1, **options)) as engine:  # type: ignore[arg-type]
        return engine.budgets


def test_pages_more_or_less_change_nothing(demo_model: Path, smallest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process happens to hold when it opens varies from run to run; slots and batches do not."""
    monkeypatch.setattr("fomoe_io.ram_budget.held_since", lambda _: 0)  # pytest's
    found = []
    for held in (52 << 20, (52 << 20) + 4096, (53 << 20) + 12288, 57 << 20):
        monkeypatch.setattr(memory, "resident_bytes", lambda *_, held=held: held)
        found.append(shared(demo_model, ram_bytes=(smallest + 20) << 20))
    assert all(budgets == found[0] for budgets in found[1:]), found


def test_what_was_held_and_freed_before_is_not_the_engines(demo_model: Path) -> None:
    """A program that needed much memory once may still open a model in less; one that holds it may not."""
    code = f"""
import sys, numpy
from fomoe_io import Engine, EngineConfig
held = numpy.ones(600 << 20, numpy.uint8)
if sys.argv[1] == "freed":
    del held
Engine.open({str(demo_model)!r}, EngineConfig(context_tokens=512, threads=1, ram_bytes=300 << 20)).close()
"""
    for what, code_of_end in (("freed", 0), ("held", 1)):
        done = subprocess.run([sys.executable, "-c", code, what], capture_output=True, text=True, timeout=60)
        assert done.returncode == code_of_end, done.stderr
    assert "a memory budget of 315 MB is too small" in done.stderr


def test_an_automatic_budget_repeats(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded, and the banner says how to ask for it again."""
    found = []
    for available in (20_200_000_000, 20_500_000_000):
        monkeypatch.setattr("fomoe_io.ram_budget.available_bytes", lambda available=available: available)
        monkeypatch.setattr(memory, "resident_bytes", lambda *_: 52 << 20)
        with Engine.open(demo_model, EngineConfig(context_tokens=512, threads=1)) as engine:
            found.append(engine.budgets)
            assert f"(--ram {engine.budgets.ram_bytes >> 20}M repeats it)" in engine.memory_lines()[0]
    assert found[0] == found[1] == shared(demo_model, ram_bytes=found[0].ram_bytes)


def test_slots_are_chosen(demo_model: Path, smallest: int) -> None:
    for slots in (4, 7, 32):
        assert {sum(pair) for pair in shared(demo_model, slots=slots).slots} == {slots}
    for slots in (3, 33):
        with pytest.raises(UsageError, match=f"slots is {slots}, and S uses 4 of 32 experts a layer"):
            shared(demo_model, slots=slots)
    with pytest.raises(BudgetError, match="with 32 slots a layer") as caught:
        shared(demo_model, slots=32, ram_bytes=(smallest + 4) << 20)
    assert "or fewer --slots" in str(caught.value)
    with pytest.raises(UsageError, match="and so do slots"):
        EngineConfig(slots=4, tiers=Tiers(0, 0.5))


@pytest.mark.parametrize("slots", [9, None])
def test_the_same_text_with_car(demo_model: Path, tmp_path: Path, smallest: int, slots: int | None) -> None:
    """Substitutions depend on what is in memory: that must not depend on the run."""
    answers = []
    for name in ("a", "b"):
        statistics = tmp_path / f"{name}.json"
        result = run(
            str(demo_model), "-p", "The river ran", "-n", "30", "-c", "512", "--temp", "0", "--car", "on",
            "--no-profile", "--ram", f"{smallest + 12}M", "--json", str(statistics),
            *(["--slots", str(slots)] if slots else []),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        values = json.loads(statistics.read_text())
        answers.append((values["token_ids"], values["substitutions"], values["budgets"]))
        assert values["peak_rss_bytes"] <= (smallest + 12) << 20
        assert slots is None or values["budgets"]["slots_per_layer"] == slots
    assert answers[0] == answers[1] and answers[0][1] > 0
