"""fomoe-serve as a user meets it: flags, notes, signals, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fomoe_io.cli import serve
from fomoe_io.cli import serve as command_module
from fomoe_io.errors import UsageError
from fomoe_io.storage.metadata import Metadata

ROOT = Path(__file__).resolve().parent.parent.parent


class Process:
    """The command, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        assert process.stderr is not None
        self._stream = process.stderr
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        self.lines += self._stream  # type: ignore[arg-type]

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        started = time.monotonic()
        while True:
            found = re.search(pattern, "".join(self.lines))
            if found:
                return found
            assert time.monotonic() - started < seconds and self.process.poll() is None, self.lines
            time.sleep(0.01)

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal; exit code and all that was said."""
        self.process.send_signal(number)
        code = self.process.wait(30)
        self._reader.join(10)
        return code, "".join(self.lines)


@contextlib.contextmanager
def command(*arguments: str, cache: Path, **environment: str) -> Iterator[Process]:
    values = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(cache),
        "PYTHONUNBUFFERED": "1",
        **environment,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "fomoe_io.cli.serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=values,
    )  # fmt: skip
    wrapped = Process(process)
    try:
        yield wrapped
    finally:
        process.kill()
        process.wait()
        wrapped._reader.join(10)
        wrapped._stream.close()


def url_of(process: Process) -> str:
    return process.wait_for(r"ready: (http://127\.0\.0\.1:\d+)")[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(demo_model: Path, tmp_path: Path, number: int) -> None:
    """The token in flight is finished, the stream is told and closed, the profile is kept, the statistics are shown."""
    profile = tmp_path / "profile.json"
    with command(str(demo_model), "--profile", str(profile), "-c", "4096", cache=tmp_path) as process:
        body = {"prompt": "It was", "n_predict": -1, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url_of(process)}/completion", json=body, timeout=60, trust_env=False) as response:
            lines = response.iter_lines()
            for _ in range(10):
                next(lines)
            process.process.send_signal(number)
            rest = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert rest[-1]["error"]["code"] == 503 and "shutting down" in rest[-1]["error"]["message"]
        code = process.process.wait(30)
        process._reader.join(10)
        said = "".join(process.lines)
    assert code == 0 and "Traceback" not in said
    assert re.search(r"\nprompt \d+ tok .* gen \d+ tok .*peak RAM .*\n$", said)
    assert json.loads(profile.read_text())["tokens"] > 5


def test_a_signal_while_nothing_happens(demo_model: Path, tmp_path: Path) -> None:
    with command(str(demo_model), "-q", cache=tmp_path) as process:
        url_of(process)
        code, said = process.end(signal.SIGTERM)
    assert code == 0 and said.count("\n") == 2  # where it listens, and that it is ready
    assert not list(tmp_path.rglob("*.json"))  # nothing was learned


def test_a_signal_while_it_loads(demo_model: Path, tmp_path: Path) -> None:
    with command(str(demo_model), cache=tmp_path) as process:
        process.wait_for("loading; listening on")
        code, said = process.end(signal.SIGTERM)
    assert code == 0 and "Traceback" not in said


def test_a_second_signal_does_not_wait(demo_model: Path, tmp_path: Path) -> None:
    """Here for an engine that reads at the pace of a drive that is as slow as none."""
    flags = ("--pace", "1M,1000000us", "--slots", "4", "--no-profile")
    with command(str(demo_model), *flags, cache=tmp_path) as process:
        process.wait_for("loading; listening on")
        process.process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.process.poll() is None  # it waits for the engine
        code, said = process.end(signal.SIGINT)
    assert code == 130 and "Traceback" not in said


def test_the_profile_is_that_of_fomoe_run(demo_model: Path, tmp_path: Path) -> None:
    with command(str(demo_model), cache=tmp_path) as process:
        url = url_of(process)
        httpx.post(f"{url}/completion", json={"prompt": "It was", "n_predict": 5}, timeout=60, trust_env=False)
        assert process.end(signal.SIGTERM)[0] == 0
    assert len(list((tmp_path / "fomoe_io" / "profiles").glob("*.json"))) == 1
    with command(str(demo_model), cache=tmp_path) as process:
        process.wait_for("warm start from a profile of")
        process.end(signal.SIGINT)


def test_llama_servers_flags(demo_model: Path, tmp_path: Path) -> None:
    flags = (
        "--model", str(demo_model), "--host", "127.0.0.1", "--alias", "tiny,small", "-c", "256", "-t", "2", "-b", "64",
        "-ub", "32", "--temp", "0", "--top-k", "1", "--seed", "42", "-n", "7", "-ngl", "99", "-np", "2", "-fa", "on",
        "--jinja", "--no-mmap", "-cb", "--metrics", "--reasoning-format", "deepseek",
        "--chat-template", "chatml", "-ctk", "f16", "-ctv", "f16", "--api-key", "k1,k2", "--timeout", "60",
    )  # fmt: skip
    with command(*flags, cache=tmp_path, FOMOE_API_KEY="k3") as process:
        url = url_of(process)
        for flag in ("-ngl", "-fa", "--jinja", "--no-mmap", "-cb", "--metrics"):
            process.wait_for(f"note: {flag} has no effect: ")
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            assert client.get("/v1/models").json()["data"][0]["aliases"] == ["tiny", "small"]
            for key in ("k1", "k2", "k3"):
                props = client.get("/props", headers={"X-Api-Key": key}).json()["default_generation_settings"]
                assert props["n_ctx"] == 256 and props["params"]["seed"] == 42 and props["params"]["n_predict"] == 7
            assert client.get("/props").status_code == 401
            assert client.get("/props", headers={"X-Api-Key": "k1"}).json()["total_slots"] == 2
            more = {"prompt": "a", "n_predict": 50, "ignore_eos": True}
            found = client.post("/completion", json=more, headers={"X-Api-Key": "k1"}).json()
            assert found["tokens_predicted"] == 7  # -n is a bound
        process.end(signal.SIGTERM)


@pytest.mark.parametrize("flag", ["--lora", "--embeddings", "--mmproj", "--model-draft", "--por", "--path"])
def test_flags_that_are_not_known_are_refused(demo_model: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        serve.main([str(demo_model), flag, "x"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("fomoe-serve: ") and "  fix: " in said and said.count("\n") == 2 and flag in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "99999"], "port"),
        (["--temp", "-1"], "--temp is -1"),
        (["--queue", "-1"], "--queue is -1"),
        (["--chat-template", "llama3"], "--chat-template chatml"),
        (["--api-key", ""], "key"),
        (["--host", "203.0.113.1"], "can't listen"),
        (["--api-key-file", "/nonexistent/keys"], "/nonexistent/keys"),
        (["-b", "0"], "-b is 0"),
    ],
)
def test_mistakes_cost_one_line(
    demo_model: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main([str(demo_model), *arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("fomoe-serve: ") and said in err and "Traceback" not in err


def test_models_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main([str(tmp_path / "none.gguf"), "--port", "0"]) == 1
    assert "no such file" in capsys.readouterr().err
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(100))
    assert serve.main([str(damaged), "--port", "0"]) == 1
    err = capsys.readouterr().err
    assert "fomoe-serve: " in err and "Traceback" not in err


def test_a_budget_that_is_too_small(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main([str(demo_model), "--port", "0", "--ram", "1M"]) == 1
    assert "too small" in capsys.readouterr().err


def test_without_its_packages(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "fomoe_io.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert serve.main([str(demo_model), "--port", "0"]) == 1
    err = capsys.readouterr().err
    assert "uvicorn is missing" in err and "pip install" in err


def options(*arguments: str) -> Any:
    return serve.serve_config(serve.parser().parse_args(["m", *arguments]))


def test_options_become_settings(tmp_path: Path) -> None:
    keys, template = tmp_path / "keys", tmp_path / "template"
    keys.write_text("a\n\n b \n")
    template.write_text("{{ messages }}")
    config = options(
        "--api-key", "c", "--api-key-file", str(keys), "--chat-template-file", str(template), "--cors", "https://x.y/",
        "--reasoning-format", "none", "--reasoning-budget", "0", "--max-body", "2M", "-s", "-1", "--no-slots",
    )  # fmt: skip
    assert config.api_keys == ("c", "a", "b") and config.chat_template == "{{ messages }}"
    assert config.allowed_origins == ("https://x.y",) and config.body_bytes == 2 << 20
    assert config.splits_thoughts is False and config.thinking is False and config.sampling.seed is None
    assert config.has_slots is False and config.has_metrics is True
    with pytest.raises(UsageError, match="both"):
        options("--chat-template", "chatml", "--chat-template-file", str(template))
    keys.write_text("\n")
    with pytest.raises(UsageError, match="no key"):
        options("--api-key-file", str(keys))


def test_an_open_door_is_said(demo_model: Path, tmp_path: Path) -> None:
    with command(str(demo_model), "--host", "0.0.0.0", cache=tmp_path) as process:
        process.wait_for("note: others can reach 0.0.0.0 and no key is asked for")
        process.wait_for("ready")
        process.end(signal.SIGTERM)


def test_sampling_is_the_requests_else_the_users_else_the_models(serve_tiny_with: Any) -> None:
    """`general.sampling.*` of a GGUF comes last, before llama.cpp's defaults."""
    live = serve_tiny_with({"general.sampling.temp": 0.25, "general.sampling.top_k": 9}, ["--top-k", "7"])
    params = live.get("/props").json()["default_generation_settings"]["params"]
    assert (params["temperature"], params["top_k"], params["top_p"]) == (0.25, 7, 0.95)
    found = live.post("/completion", {"prompt": "a", "n_predict": 1, "temperature": 0.5}).json()
    assert (found["generation_settings"]["temperature"], found["generation_settings"]["top_k"]) == (0.5, 7)


@pytest.fixture
def serve_tiny_with(serve: Any, open_tiny: Any) -> Any:
    """A server of the command's own settings, for a model with more metadata."""

    def start(metadata: dict[str, Any], arguments: list[str]) -> Any:
        def opened() -> Any:
            engine = open_tiny()
            engine.metadata = Metadata({**engine.metadata, **metadata})
            return engine

        config = command_module.serve_config(command_module.parser().parse_args(["model.gguf", *arguments]))
        return serve(engine=opened, sampling=config.sampling, chosen_sampling=config.chosen_sampling)

    return start
