"""What a run learns about a model: kept on exit, loaded at the next start, and never seen in the answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from prompt_toolkit.history import InMemoryHistory

from fomoe_io import Engine, EngineConfig, Tiers
from fomoe_io.cli import prompt
from fomoe_io.cli.run import main as run
from fomoe_io.errors import FormatError
from fomoe_io.experts import learned_profile
from fomoe_io.experts.learned_profile import HALF_LIFE_TOKENS, default_path, merged
from fomoe_io.experts.profile import Profile
from fomoe_io.storage.store import Store
from fomoe_io.trace.trace import Trace
from layout_tool.main import main as layout

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPT = "The old man went down to the sea and looked at the ships"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FOMOE_CACHE", raising=False)
    return tmp_path / "home"


def answer(model: Path, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, dict, str]:
    """(stdout, statistics, stderr) of a greedy one-shot run with a quarter of the experts in memory."""
    arguments = [str(model), "-p", PROMPT, "-n", "30", "--raw", "--temp", "0", "--tiers", "vram=10%,dram=15%"]
    arguments += ["--lookahead", "off"]  # reads are compared
    capsys.readouterr()
    assert run([*arguments, "--json", str(folder / "json"), *options]) == 0
    said = capsys.readouterr()
    return said.out, json.loads((folder / "json").read_text()), said.err


def test_a_run_learns_and_the_next_starts_warm(
    demo_model: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, cold, said = answer(demo_model, tmp_path, capsys)
    assert "warm start" not in said
    path = default_path(Store.open(demo_model).fingerprint)
    assert path.parent == home / "fomoe_io" / "profiles" and list(path.parent.iterdir()) == [path]
    learned = Profile.load(path)
    tokens = cold["prompt_tokens"] + cold["generated_tokens"]
    assert learned.tokens == tokens and all(picks.sum() == 4 * tokens for picks in learned.counts.values())

    again, warm, said = answer(demo_model, tmp_path, capsys)
    assert again == text and warm["token_ids"] == cold["token_ids"]
    assert f"warm start from a profile of {tokens:,} tokens" in said
    assert warm["tiers"]["nvme"]["hits"] < 0.9 * cold["tiers"]["nvme"]["hits"]
    assert Profile.load(path).tokens == 2 * tokens  # 0.1 % have faded
    third = answer(demo_model, tmp_path, capsys)
    fourth = answer(demo_model, tmp_path, capsys, "--no-profile")
    assert third[0] == fourth[0] == text and Profile.load(path).tokens == 3 * tokens
    assert fourth[1]["tiers"] == cold["tiers"]


def test_a_named_profile(demo_model: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is made when it does not exist; the same file gives the same counts, not only the same text."""
    mine, copy = tmp_path / "deep" / "mine.json", tmp_path / "copy.json"
    answer(demo_model, tmp_path, capsys, "--profile", str(mine))
    assert not home.exists()
    copy.write_bytes(mine.read_bytes())
    first = answer(demo_model, tmp_path, capsys, "--profile", str(mine))
    second = answer(demo_model, tmp_path, capsys, "--profile", str(copy))
    assert first[0] == second[0] and first[1]["tiers"] == second[1]["tiers"]
    assert mine.read_bytes() == copy.read_bytes()


def test_counts_of_another_program_are_read_and_left_alone(demo_model: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "counts.freq"
    foreign.write_bytes(b"QERF, of another program")
    with Engine.open(demo_model, EngineConfig(context_tokens=64)) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned_profile, "for_warm_start", lambda wanted, store: None)
        engine.session().prefill(range(20))
        assert learned_profile.save(engine, foreign) == 0
    assert foreign.read_bytes() == b"QERF, of another program"


def test_what_does_not_fit_is_refused_or_passed_over(
    demo_model: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, cold, _ = answer(demo_model, tmp_path, capsys)
    path = default_path(Store.open(demo_model).fingerprint)
    body = json.loads(path.read_text())
    strangers = ({"fingerprint": "other"}, {"picks": {"99": [1]}})
    for damaged in [b"{", *(json.dumps(body | stranger).encode() for stranger in strangers)]:
        path.write_bytes(damaged)
        same, counted, _ = answer(demo_model, tmp_path, capsys)
        assert same == text and counted["tiers"] == cold["tiers"]
        assert Profile.load(path).tokens == cold["prompt_tokens"] + cold["generated_tokens"]  # made anew
        (tmp_path / "named").write_bytes(damaged)
        assert run([str(demo_model), "-p", PROMPT, "-n", "1", "--profile", str(tmp_path / "named")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("fomoe-run: ") and len(error.strip().splitlines()) <= 2
        assert (tmp_path / "named").read_bytes() == damaged


def test_it_can_not_be_kept(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache that can't be written is a note, a file that was named an error before anything is read."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    text, _, said = answer(demo_model, tmp_path, capsys)
    assert text.startswith(PROMPT) and "note: the profile was not kept" in said
    named = tmp_path / "file" / "profile"
    assert run([str(demo_model), "-p", PROMPT, "-n", "3", "--raw", "--profile", str(named)]) == 1
    said = capsys.readouterr()
    assert not said.out and said.err.startswith(f"fomoe-run: {tmp_path / 'file'}: Not a directory")


def test_neither_a_home_nor_the_right_to_read(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container: the answer comes, and a note says why nothing was learned."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "FOMOE_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", no_home)
        text, cold, said = answer(demo_model, tmp_path, capsys)
        assert text.startswith(PROMPT)
        assert "note: the profile was not kept: there is no home directory" in said
        assert isinstance(prompt._history(), InMemoryHistory)
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/version")  # where nothing can be made
    assert isinstance(prompt._history(), InMemoryHistory)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert answer(demo_model, tmp_path, capsys)[0] == text

    def refuse(path: Path) -> Profile:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Profile, "load", refuse)
    again, counted, said = answer(demo_model, tmp_path, capsys)
    assert again == text and counted["tiers"] == cold["tiers"] and "warm start" not in said


def test_an_interrupted_run_is_kept(demo_model: Path, tmp_path: Path, home: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fomoe_io.cli.run",
        str(demo_model),
        "-p",
        PROMPT,
        "-n",
        "4000",
        "--raw",
        "--ignore-eos",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=os.environ)
    assert process.stdout is not None and len(process.stdout.read(len(PROMPT) + 40)) > 0
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    assert process.wait(timeout=60) in (0, 130)
    assert Profile.load(default_path(Store.open(demo_model).fingerprint)).tokens > 10


def test_merging(demo_model: Path) -> None:
    """Old counts halve with every half-life of new tokens, however these are cut into runs."""
    store = Store.open(demo_model)
    random = np.random.default_rng(51)
    old = Profile(10_000, {layer: random.integers(0, 90_000, 32) for layer in store.experts}, "", store.fingerprint)
    none = {layer: np.zeros(32, np.int64) for layer in store.experts}
    whole = merged(old, none, HALF_LIFE_TOKENS, store)
    parts = old
    for _ in range(4):
        parts = merged(parts, none, HALF_LIFE_TOKENS // 4, store)
    for layer, picks in whole.counts.items():
        np.testing.assert_allclose(picks, old.counts[layer] / 2, atol=0.5)
        np.testing.assert_allclose(picks, parts.counts[layer], atol=3)
    assert whole.tokens == HALF_LIFE_TOKENS + 5000 and abs(parts.tokens - whole.tokens) > 1000  # each run's are newer
    assert merged(None, none, 7, store).tokens == 7


def test_a_store_s_profile_is_the_first(demo_model: Path, tmp_path: Path, home: Path) -> None:
    """A packed store starts by the profile in it; what is learned adds to that."""
    (tmp_path / "text").write_text(PROMPT * 8)
    assert layout(["profile", str(demo_model), "-f", str(tmp_path / "text"), "-o", str(tmp_path / "p")]) == 0
    assert layout(["pack", str(demo_model), "--to", str(tmp_path / "s"), "--profile", str(tmp_path / "p")]) == 0
    packed = Profile.load(tmp_path / "p")
    config = EngineConfig(tiers=Tiers(0.1, 0.2), profile="learned", context_tokens=64, trace=tmp_path / "t")
    with Engine.open(tmp_path / "s", config) as engine:
        assert engine.profile is not None and engine.profile.tokens == packed.tokens
        engine.session().prefill(range(20))
        assert learned_profile.save(engine, "learned") == packed.tokens + 20
    hottest = {layer: set(np.argsort(-picks, kind="stable")[:10].tolist()) for layer, picks in packed.counts.items()}
    for number, layer in Trace.load(tmp_path / "t").layers.items():
        assert len(set(layer.seeds.tolist()) & hottest[number]) >= 9  # ties may fall either way
        assert (np.diff(layer.seed_scores) <= 0).all()


def test_nothing_learned_is_nothing_written(demo_model: Path, home: Path) -> None:
    with Engine.open(demo_model, EngineConfig(context_tokens=64)) as engine:
        assert learned_profile.save(engine, "learned") == 0
    assert not home.exists()


def test_another_model_s_profile(demo_model: Path, tmp_path: Path) -> None:
    Profile(5, {0: np.ones(32, np.int64)}, "", "0" * 32).save(tmp_path / "p")
    with pytest.raises(FormatError, match="another model"):
        Engine.open(demo_model, EngineConfig(profile=tmp_path / "p"))
