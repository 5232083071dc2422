"""Tokenizer, sampler, chat templates and stop strings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from fomoe_io.errors import FormatError, UsageError
from fomoe_io.storage.gguf import GGUFFile
from fomoe_io.text.chat import ChatTemplate
from fomoe_io.text.generation import StopText
from fomoe_io.text.sampler import Sampler, SamplingConfig
from fomoe_io.text.tokenizer import StreamDecoder, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer.from_metadata(GGUFFile.open(demo_model).metadata)


def test_every_vector_of_llama_cpp(shared: Path, tokenizer: Tokenizer) -> None:
    reference = json.loads((shared / "reference/tokenizer-vectors.json").read_text())
    for v in reference["vectors"]:
        assert tokenizer.encode(v["text"]) == v["ids_plain"]
        assert tokenizer.encode(v["text"], special=True) == v["ids_special"]
        assert tokenizer.decode(v["ids_plain"], special=True) == v["detok_plain"]
        assert tokenizer.decode(v["ids_special"], special=True) == v["detok_special"]
        assert tokenizer.decode(v["ids_special"]) == v["detok_special_omitted"]
    digest = hashlib.sha256()
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.decode_bytes(token, special=True)
        digest.update(len(piece).to_bytes(2, "little") + piece)
    assert digest.hexdigest() == reference["all_pieces_sha256"]


def test_streaming_equals_decoding(tokenizer: Tokenizer) -> None:
    text = "naïve — 北京 🙂 and\ttabs\r\n"
    ids = tokenizer.encode(text)
    assert any(b"\xef\xbf\xbd".decode() in tokenizer.decode([i]) for i in ids)  # characters cut across tokens
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.add(i) for i in ids] + [decoder.finish()]
    assert "".join(pieces) == text and all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "not supported"),
        ({"tokenizer.ggml.pre": "martian"}, "martian"),
        ({"tokenizer.ggml.tokens": None}, "no vocabulary"),
        ({"tokenizer.ggml.merges": None}, "no merges"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token types"),
    ],
)
def test_damaged_vocabularies(demo_model: Path, changes: dict[str, object], message: str) -> None:
    metadata = {**dict(GGUFFile.open(demo_model).metadata), **changes}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_metadata(metadata)


def test_end_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id == 8189 and tokenizer.eog_ids == {8189, 8191}


def test_sampler_is_seeded_and_filters() -> None:
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 3

    def draw(**settings: object) -> list[int]:
        sampler = Sampler(SamplingConfig(**settings))  # type: ignore[arg-type]
        return [sampler.sample(logits) for _ in range(300)]

    assert draw(seed=4) == draw(seed=4) != draw(seed=5)
    best = np.argsort(-logits)
    assert set(draw(temperature=0)) == {int(best[0])}
    assert set(draw(top_k=3, top_p=1.0, min_p=0.0, temperature=10, seed=1)) == {int(i) for i in best[:3]}
    assert set(draw(top_k=0, top_p=1e-6, temperature=10, seed=1)) == {int(best[0])}
    p = np.exp(logits - logits.max())
    assert set(draw(top_k=0, top_p=1.0, min_p=0.5, temperature=1, seed=1)) <= set(np.flatnonzero(p >= 0.5).tolist())


def test_sampler_frequencies() -> None:
    """Plain sampling draws with the softmax's probabilities."""
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(SamplingConfig(temperature=1, top_k=0, top_p=1, min_p=0, seed=3))
    counts = np.bincount([sampler.sample(logits) for _ in range(8000)], minlength=4) / 8000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.02


def test_repeat_penalty() -> None:
    sampler = Sampler(SamplingConfig(temperature=0, repeat_penalty=2, repeat_last=2))
    logits = np.array([1.0, 0.9, -0.1], np.float32)
    assert sampler.sample(logits) == 0
    sampler.accept(0)
    assert sampler.sample(logits) == 1
    sampler.accept(1)
    assert sampler.sample(logits) == 0  # both halved
    sampler.accept(2)
    assert sampler.sample(logits) == 0  # the first has left the window
    assert logits.tolist() == [1.0, np.float32(0.9), np.float32(-0.1)]


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="top_p"):
        SamplingConfig(top_p=1.5)


def test_stop_text() -> None:
    stop = StopText(["STOP", "\n\n"])
    assert [stop.add(piece) for piece in ("one S", "T", "ill ST", "OP gone")] == ["one ", "", "STill ", ""]
    assert stop.found
    stop = StopText(["END"])
    assert stop.add("EN") == "" and not stop.found and stop.finish() == "EN"


def test_chat_template() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    text = ChatTemplate(source).render([{"role": "user", "content": " hi "}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(FormatError, match="damaged"):
        ChatTemplate("{% for %}")
    with pytest.raises(FormatError, match="only users"):
        ChatTemplate("{{ raise_exception('only users') }}").render([])
    with pytest.raises(FormatError):  # the sandbox holds
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}").render([])
    assert ChatTemplate.from_metadata({}, bos_text="", eos_text="") is None
