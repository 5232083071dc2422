"""LLM: a model in three lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fomoe_io import LLM, BudgetError, Completion, Engine, EngineConfig, SamplingConfig, UsageError
from fomoe_io.text.generation import Conversation
from fomoe_io.text.sampler import Sampler
from tests.cli.test_hostile_text import with_key
from tests.tiny_model import Tiny, write_tiny

GREEDY = SamplingConfig(temperature=0)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def llm(demo_model: Path) -> Any:
    with LLM(demo_model, ram="512M", context=256, device="cpu") as found:
        yield found


def test_the_examples_run() -> None:
    """In a process of their own: this one may hold more memory than they ask for."""
    root = Path(__file__).resolve().parent.parent.parent
    code = (
        "import doctest, fomoe_io.llm, fomoe_io.text.sampler\n"
        "for module in (fomoe_io.llm, fomoe_io.text.sampler):\n"
        "    found = doctest.testmod(module)\n"
        "    assert found.attempted and not found.failed"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_generate_is_what_the_engine_says(llm: LLM, demo_model: Path) -> None:
    answer = llm.generate("It was a dark and", GREEDY, max_tokens=12)
    with Engine.open(demo_model, EngineConfig(context_tokens=256)) as engine:
        tokens = engine.tokenizer.encode("It was a dark and", add_bos=engine.tokenizer.add_bos)
        conversation = Conversation(engine.timeline())
        pairs = list(conversation.generate(tokens, Sampler(GREEDY), most=12))
    assert answer.token_ids == [token for token, _ in pairs if token >= 0] and len(answer.token_ids) == 12
    assert str(answer) == answer.text == "".join(text for _, text in pairs)
    assert (answer.stop_reason, answer.prompt_tokens) == ("limit", len(tokens))


def test_stream_and_seed(llm: LLM) -> None:
    first = llm.generate("The river", max_tokens=8)
    again = llm.generate("The river", SamplingConfig(seed=first.seed), max_tokens=8)
    assert again == first
    assert "".join(llm.stream("The river", SamplingConfig(seed=first.seed), max_tokens=8)) == first.text


def test_stop(llm: LLM) -> None:
    whole = llm.generate("It was a dark and", GREEDY, max_tokens=12)
    word = whole.text.split()[1]
    cut = llm.generate("It was a dark and", GREEDY, max_tokens=12, stop=word)
    assert cut.stop_reason == "word" and cut.text == whole.text[: whole.text.index(word)]
    full = llm.generate("word " * 200, GREEDY)
    assert full.stop_reason in ("context", "eos")


def test_chat(tmp_path: Path) -> None:
    model = with_key(
        write_tiny(tmp_path / "t.gguf", Tiny(architecture="qwen3moe", layers=2), 3), "tokenizer.chat_template", TEMPLATE
    )
    with LLM(model, context=128, device="cpu") as llm:
        one = llm.chat("hi", GREEDY, max_tokens=3)
        assert isinstance(one, Completion) and one.prompt_tokens == len("user: hi\nassistant: ")
        messages = [{"role": "user", "content": "hi"}]
        assert llm.chat(messages, GREEDY, max_tokens=3).token_ids == one.token_ids
        assert "".join(llm.stream(messages, GREEDY, max_tokens=3)) == one.text
        for bad in ([], [{"role": "user"}], ["hi"], [{"role": "user", "content": ["parts"]}]):
            with pytest.raises(UsageError, match="messages"):
                llm.chat(bad)  # type: ignore[arg-type]


def test_mistakes(llm: LLM, demo_model: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        llm.chat("hi")
    with pytest.raises(UsageError, match="leave no room"):
        llm.generate("word " * 400)
    with pytest.raises(UsageError, match="empty"):
        llm.generate("")
    with pytest.raises(UsageError, match="expected a text"):
        llm.generate(["x"])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="n_ctx"):
        LLM(demo_model, n_ctx=3)
    with pytest.raises(BudgetError):
        LLM(demo_model, ram="5M", device="cpu")
