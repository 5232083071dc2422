"""After an interrupt a conversation goes on as if the interrupted question had been asked in one piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig
from fomoe_io.text.generation import Conversation

TOKENS = list(range(100, 140))


def interrupted_between_batches(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    conversation.read(TOKENS[:20], stop)


def interrupted_in_a_token(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(code: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversation.session._engine, "_check", stop)
        conversation.read(TOKENS[:20])


@pytest.mark.parametrize("interrupt", [interrupted_between_batches, interrupted_in_a_token])
def test_the_next_question_is_read_whole(demo_model: Path, monkeypatch: pytest.MonkeyPatch, interrupt: object) -> None:
    with Engine.open(demo_model, EngineConfig(context_tokens=256, batch_tokens=8)) as engine:
        want = Conversation(engine.session(), engine.tokenizer).read(TOKENS)
        conversation = Conversation(engine.session(), engine.tokenizer)
        with pytest.raises(KeyboardInterrupt):
            interrupt(conversation, monkeypatch)  # type: ignore[operator]
        np.testing.assert_array_equal(conversation.read(TOKENS), want)
        assert conversation.session.position == len(TOKENS)
