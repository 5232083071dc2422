"""What was read once is not read again: turns of an agent, helpers beside it, restarts, slots."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fomoe_io import Engine, EngineConfig
from fomoe_io.cli.options import CHATML
from fomoe_io.serve.settings import ServeConfig
from tests.serve.conftest import GREEDY, Live, serving
from tests.serve.test_command import command, url_of

SLACK_TOKENS = 64
WORDS = ("the", "a", "of", "river", "house", "stone", "night", "in", "and", "to", "was", "there", "she", "said")
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
)
"""As many templates do, it leaves earlier thoughts out."""


def text(words: int, seed: int) -> str:
    dice = random.Random(seed)
    return " ".join(dice.choice(WORDS) for _ in range(words))


class Agent:
    """A client that sends its whole history each time, as agents do."""

    def __init__(self, http: httpx.Client, prefix_words: int) -> None:
        self._http = http
        self.messages = [{"role": "system", "content": text(prefix_words, 1)}]
        self._known = 0

    def turn(self, words: int = 12, most: int = 24, **how: Any) -> tuple[int, int]:
        """(tokens of the prompt that were read, that were new)"""
        self.messages.append({"role": "user", "content": text(words, len(self.messages))})
        answer = self.ask(most, **how)
        usage = answer["usage"]
        read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        assert answer["timings"]["cache_n"] == usage["prompt_tokens_details"]["cached_tokens"]
        new = usage["prompt_tokens"] - self._known
        self._known = usage["prompt_tokens"] + usage["completion_tokens"]
        self.messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        return read, new

    def ask(self, most: int, **how: Any) -> dict[str, Any]:
        body = {"messages": self.messages, "max_tokens": most, "ignore_eos": True, **how}
        response = self._http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found


@pytest.fixture(scope="module")
def open_kept(demo_model: Path) -> Callable[[], Engine]:
    config = EngineConfig(context_tokens=2048, batch_tokens=128, threads=2, cache_bytes="32M")
    return lambda: Engine.open(demo_model, config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slots")


@pytest.fixture(scope="module")
def live(open_kept: Callable[[], Engine], folder: Path) -> Iterator[Live]:
    config = ServeConfig(port=0, sampling=GREEDY, chat_template=CHATML, slot_folder=folder)
    with serving(open_kept, config) as server:
        yield server


def test_an_agent_and_its_helpers(live: Live) -> None:
    agent, helper = Agent(live.http, 300), Agent(live.http, 10)
    agent.turn()
    for number in range(4):
        helper.messages = helper.messages[:1]
        helper.turn(words=5 + number, most=4)
        read, new = agent.turn()
        assert new < 200 and read <= new + SLACK_TOKENS
    agent.messages.append({"role": "user", "content": "And now?"})
    want = agent.ask(16, cache_prompt=False)
    assert want["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    found = agent.ask(16)["usage"]
    assert found["prompt_tokens"] - found["prompt_tokens_details"]["cached_tokens"] < 32
    first = Agent(live.http, 250)
    first.turn()
    want, first.messages = first.messages[-1], first.messages[:-1]
    for reuse in (True, False):
        assert first.ask(24, cache_prompt=reuse)["choices"][0]["message"] == want


def test_another_conversation_with_the_same_system_text(live: Live) -> None:
    Agent(live.http, 200).turn()
    other = Agent(live.http, 200)
    other.messages.append({"role": "user", "content": "Quite another question"})
    usage = other.ask(4)["usage"]
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] <= SLACK_TOKENS


def test_a_template_that_drops_thoughts(open_kept: Callable[[], Engine]) -> None:
    config = ServeConfig(port=0, sampling=GREEDY, chat_template=THINKING, splits_thoughts=False)
    with serving(open_kept, config) as live:
        agent = Agent(live.http, 200)
        for number in range(3):
            if number:  # what it thought comes to nothing
                agent.messages[-1]["content"] = "long thoughts</think>" + text(20, 99)
            read, _ = agent.turn(most=40)
            assert not number or read <= 2 * (20 + 12) + SLACK_TOKENS


def slot(live: Live, action: str, name: str | None = None) -> httpx.Response:
    body = None if name is None else {"filename": name}
    return live.post(f"/slots/0?action={action}", body)  # type: ignore[no-any-return]


def test_a_slot_is_saved_and_restored(live: Live, folder: Path) -> None:
    agent = Agent(live.http, 150)
    agent.turn()
    saved = slot(live, "save", "one.bin").json()
    assert saved["n_saved"] > 150 and saved["n_written"] == (folder / "one.bin").stat().st_size
    erased = slot(live, "erase").json()
    assert erased == {"id_slot": 0, "n_erased": saved["n_saved"]}
    restored = slot(live, "restore", "one.bin").json()
    assert (restored["n_restored"], restored["n_read"]) == (saved["n_saved"], saved["n_written"])
    read, new = agent.turn()
    assert read <= new + 1


@pytest.mark.parametrize(
    ("action", "name", "status"),
    [
        ("restore", "nothing", 400),
        ("restore", "damaged", 400),
        ("restore", "../one.bin", 400),
        ("save", "a/b", 400),
        ("save", "", 400),
        ("save", ".hidden", 400),
        ("save", "x" * 250, 400),
        ("save", "folder", 500),
        ("move", "one.bin", 400),
    ],
)
def test_a_slot_that_can_not(live: Live, folder: Path, action: str, name: str, status: int) -> None:
    (folder / "damaged").write_bytes(b"fomoekv1" + bytes(9000))
    (folder / "folder").mkdir(exist_ok=True)
    Agent(live.http, 20).turn(most=2)
    response = slot(live, action, name)
    assert response.status_code == status and "\n" not in response.json()["error"]["message"]
    assert Agent(live.http, 20).turn(most=2)
    assert live.post("/slots/1?action=save", {"filename": "a"}).status_code == 400


def test_slots_without_a_folder(open_kept: Callable[[], Engine]) -> None:
    with serving(open_kept, ServeConfig(port=0, sampling=GREEDY)) as live:
        response = slot(live, "save", "a")
        assert response.status_code == 501 and "--slot-save-path" in response.json()["error"]["message"]


FLAGS = ("--temp", "0", "-t", "2", "-b", "128", "--no-profile", "--chat-template", "chatml", "--cache-disk", "100M")


def replay(model: Path, cache: Path, *, context: int, prefix_words: int, turns: int) -> None:
    """A server that is killed after every third turn, without warning; the last time it is told to end."""
    done, agent = 0, None
    while done < turns:
        with command(str(model), "-c", str(context), *FLAGS, cache=cache) as process:
            with httpx.Client(base_url=url_of(process), timeout=600, trust_env=False) as http:
                if agent is None:
                    agent = Agent(http, prefix_words)
                agent._http = http
                for _ in range(min(3, turns - done)):
                    read, new = agent.turn()
                    assert not done or read <= new + SLACK_TOKENS
                    done += 1
            code, said = process.end(signal.SIGKILL if done < turns else signal.SIGTERM)
            assert "note" not in said and code in (0, -9)


def test_turns_of_an_agent_whose_server_is_killed(demo_model: Path, tmp_path: Path) -> None:
    replay(demo_model, tmp_path, context=2048, prefix_words=300, turns=5)


def test_a_server_that_is_told_to_end_writes_first(demo_model: Path, tmp_path: Path) -> None:
    body = {"prompt": text(300, 5), "n_predict": -1, "ignore_eos": True, "stream": True}
    said, told = "", False
    with command(str(demo_model), "-c", "2048", *FLAGS, cache=tmp_path) as process:
        url = url_of(process)
        with httpx.stream("POST", f"{url}/completion", json=body, timeout=60, trust_env=False) as response:
            for line in response.iter_lines():
                said += json.loads(line[6:]).get("content", "") if line.startswith("data: ") else ""
                if len(said) > 300 and not told:
                    told = True
                    process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(30) == 0
    with command(str(demo_model), "-c", "2048", *FLAGS, cache=tmp_path) as process:
        more = {**body, "prompt": body["prompt"] + said + " and then", "n_predict": 1, "stream": False}
        found = httpx.post(f"{url_of(process)}/completion", json=more, timeout=60, trust_env=False).json()
        assert found["timings"]["prompt_n"] <= SLACK_TOKENS < found["timings"]["cache_n"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_turns_on_a_long_prefix(demo_model: Path, tmp_path: Path) -> None:
    replay(demo_model, tmp_path, context=16384, prefix_words=5000, turns=20)


# ---- calls of functions ----

TOOL_TEMPLATE = """\
{%- if tools %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call with <tool_call>
{"name": "f", "arguments": {}}
</tool_call>
{% endif %}
{%- for m in messages %}{{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>
{"arguments": {{ call.function.arguments | tojson }}, "name": "{{ call.function.name }}" }
</tool_call>{% endfor %}
{% endfor %}assistant: """
"""It writes calls in another order than the model is held to."""

PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": text(150, 3), "parameters": PARAMETERS}}]


def test_calls_are_replayed_as_they_were_sampled(demo_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    kept = {"cache_bytes": "32M", "cache_disk_bytes": 100 << 20, "cache_folder": tmp_path}
    config = EngineConfig(context_tokens=2048, batch_tokens=128, threads=2, **kept)  # type: ignore[arg-type]
    served = ServeConfig(port=0, sampling=GREEDY, chat_template=TOOL_TEMPLATE)
    talk: list[dict[str, Any]] = [{"role": "user", "content": "Will it rain?"}]
    known = 0
    for slack in (8, SLACK_TOKENS):  # before a restart, and after it
        with serving(lambda: Engine.open(demo_model, config), served) as live:
            for _ in range(3):
                read, prompt, written = called(live, talk)
                assert not known or read <= prompt - known + slack
                known = prompt + written


def called(live: Live, talk: list[dict[str, Any]]) -> tuple[int, int, int]:
    """A turn with a call and its result: (tokens that were read, of the prompt, of the answer)."""
    body = {"messages": talk, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    found = live.post("/v1/chat/completions", {**body, "max_tokens": 200}).json()
    usage, message = found["usage"], found["choices"][0]["message"]
    talk += [message, {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "Rain."}]
    cached, prompt = usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]
    return prompt - cached, prompt, usage["completion_tokens"]
