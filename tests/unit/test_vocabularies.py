"""Vocabularies as files in the wild have them: read as llama.cpp reads them, or refused in one line."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fomoe_io.errors import FormatError
from fomoe_io.storage.gguf import GGUFFile
from fomoe_io.text.pre_tokenizers import PRE_TOKENIZERS
from fomoe_io.text.tokenizer import MOST_ELEMENTS, Tokenizer
from tests.tiny_model import vocabulary

KEYS = "tokenizer.ggml."
LETTERS = vocabulary(258)[0][:256]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


def metadata(
    extra: list[tuple[str, int]] | None = None, pairs: list[str] | None = None, /, **changes: Any
) -> dict[str, Any]:
    """Of the 256 byte symbols and the extra tokens with their types."""
    texts = [*LETTERS, *(text for text, _ in extra or [])]
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": texts,
        "token_type": [NORMAL] * 256 + [kind for _, kind in extra or []],
        "merges": pairs or [],
        **changes,
    }
    return {KEYS + key: value for key, value in values.items() if value is not None}


def tokenizer(*arguments: Any, **changes: Any) -> Tokenizer:
    return Tokenizer.from_metadata(metadata(*arguments, **changes))


def pieces(t: Tokenizer, text: str, *, special: bool = False) -> list[str]:
    return [t.token_text(i) for i in t.encode(text, special=special)]


def cuts(t: Tokenizer, text: str) -> list[str]:
    """Words before the merging, of a text whose bytes are all symbols of their own."""
    assert t._bpe.pre_tokenizer is not None
    return [word for word, _ in t._bpe.pre_tokenizer.pre_tokenize_str(text)]


# ---- pre-tokenizers ----


def test_no_pre_tokenizer_is_the_default_one_and_is_said() -> None:
    for pre in (None, ""):
        t = tokenizer(pre=pre)
        assert "does not name its pre-tokenizer" in t.notes[0]
        assert cuts(t, "a+b  c1234, d") == cuts(tokenizer(pre="default"), "a+b  c1234, d")
    assert tokenizer(pre="default").notes == tokenizer(pre="qwen2").notes == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a+b=c", ["a", "+", "b", "=", "c"]),  # five symbols count as punctuation there, others not
        ("x*y %`", ["x", "*", "y", "Ġ", "%", "`"]),
        ("it's", ["it", "'", "s"]),
        ("hi, 1234567 x", ["hi", ",", "Ġ", "123", "456", "7", "Ġx"]),
        ("a  \n b", ["a", "ĠĠĊ", "Ġb"]),
    ],
)
def test_the_default_pre_tokenizer(text: str, expected: list[str]) -> None:
    assert cuts(tokenizer(pre="default"), text) == expected


def test_names_of_the_same_pre_tokenizer() -> None:
    assert PRE_TOKENIZERS["deepseek-r1-qwen"] == PRE_TOKENIZERS["qwen2"] != PRE_TOKENIZERS["qwen35"]
    assert cuts(tokenizer(pre="deepseek-r1-qwen"), "It'LL be 12") == ["It", "'LL", "Ġbe", "Ġ", "1", "2"]


def test_a_bos_where_the_pre_tokenizer_has_it() -> None:
    assert tokenizer(pre="llama-bpe", bos_token_id=5).add_bos
    assert not tokenizer(pre="llama-bpe", bos_token_id=5, add_bos_token=False).add_bos
    assert not tokenizer(bos_token_id=5).add_bos


# ---- merges ----


def reference_merges(word: str, ranks: dict[tuple[str, str], int], ids: dict[str, int]) -> list[int]:
    """llama.cpp's: the lowest rank first, of texts; what is no token at the end is spelt."""
    symbols = list(word)
    while True:
        found = [(ranks[pair], i) for i in range(len(symbols) - 1) if (pair := (symbols[i], symbols[i + 1])) in ranks]
        if not found:
            break
        _, at = min(found)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    out = []
    for symbol in symbols:
        out += [ids[symbol]] if symbol in ids else [ids[c] for c in symbol if c.isascii() and c in ids]
    return out


def test_merges_of_unknown_tokens_work_as_in_llama_cpp() -> None:
    """Random vocabularies that lack half of what their merges make, and some symbols."""
    rng = random.Random(7)
    spelt = 0
    for _ in range(150):
        alphabet = [c for c in "abcdeé" if rng.random() < 0.85]
        parts, ranks = [*"abcde", "Ã", "©"], {}
        for rank in range(12):
            pair = rng.choice(parts), rng.choice(parts)
            ranks.setdefault(pair, rank)
            parts.append("".join(pair))
        made = [text for text in dict.fromkeys(parts[7:]) if rng.random() < 0.5]
        symbols = [c for c in alphabet if c != "é"] + (["Ã", "©"] if "é" in alphabet else [])
        texts = [*symbols, *(text for text in made if text not in symbols)]
        ids = {text: i for i, text in enumerate(texts)}
        merges = [f"{left} {right}" for left, right in ranks] * 2  # of a pair that comes twice the first rank counts
        t = tokenizer(tokens=texts or ["x"], token_type=None, merges=merges)
        for _ in range(10):
            text = "".join(rng.choice("abcdeé") for _ in range(rng.randint(1, 9)))
            word = text.replace("é", "Ã©")
            assert t.encode(text) == reference_merges(word, ranks, ids), (text, ranks, ids)
            spelt += t.encode(text) != [ids[c] for c in word if c in ids]
    assert spelt > 300  # merges did something


def test_a_merge_that_makes_a_special_token() -> None:
    """The type of a token does not keep merges from making it."""
    for kind in (CONTROL, USER_DEFINED, UNKNOWN):
        t = tokenizer([("ab", kind), ("abc", NORMAL)], ["a b", "ab c"])
        assert pieces(t, "abc") == (["ab", "c"] if kind == USER_DEFINED else ["abc"])
        assert pieces(t, "xab") == ["x", "ab"]


def test_tokens_that_share_a_text_load_and_are_said() -> None:
    t = tokenizer([("ab", NORMAL), ("ab", NORMAL), ("<|im_end|>", NORMAL), ("<|im_end|>", CONTROL)], ["a b"])
    assert t.encode("ab") == [256]
    assert t.eog_ids == {258, 259}
    assert "2 tokens" in t.notes[0]
    assert t.encode("ab<|im_end|>", special=True) == [256, 258]


def test_empty_tokens_have_names() -> None:
    t = tokenizer([("", NORMAL), ("", CONTROL)])
    assert t.token_text(256) == "[EMPTY_256]" and t.encode("[EMPTY_257]", special=True) == [257]


# ---- special tokens ----


@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>",
     "<|end_of_text|>", "<end_of_utterance>", "[EOT]", "<eos>", "</s>", "[e~[", "<|return|>"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
def test_ends_are_known_by_their_text(text: str, kind: int) -> None:
    t = tokenizer([("<|im_start|>", CONTROL), (text, kind)])
    assert t.eog_ids == {257}
    assert t.encode(f"a{text}", special=True)[-1] == 257 and t.encode(f"a{text}")[-1] != 257
    assert t.decode([257]) == "" and t.decode([257], special=True) == text
    assert (text in " ".join(t.notes)) == (kind != CONTROL)


def test_fill_in_the_middle_tokens() -> None:
    """Padding, repository and separator end a generation; of several texts of a role one counts."""
    texts = ["<|fim_prefix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<PAD>", "other"]
    t = tokenizer([(text, USER_DEFINED) for text in texts])
    assert t.eog_ids == {257, 258, 259}
    assert t.decode([256]) == "" and t.decode([260]) == "<PAD>"
    t = tokenizer([(text, USER_DEFINED) for text in texts], fim_pad_token_id=261)
    assert t.eog_ids == {261, 258, 259} and t.decode([261]) == "other"


def test_ends_that_the_metadata_names() -> None:
    t = tokenizer([("x1", NORMAL), ("x2", NORMAL), ("x3", CONTROL)], eos_token_id=256, eot_token_id=257, eom_token_id=5)
    assert t.eog_ids == {256, 257, 5} and t.eos_id == 256


def test_answers_of_several_parts() -> None:
    """gpt-oss's <|end|> ends a part, and its marks are printed; gemma4's </s> is text."""
    texts = ["<|end|>", "<|return|>", "<|call|>", "<|channel|>"]
    t = tokenizer([(text, CONTROL) for text in texts])
    assert t.eog_ids == {257, 258} and t.decode([256, 257, 259]) == "<|end|><|channel|>"
    t = tokenizer([("</s>", CONTROL), ("<|tool_response>", CONTROL)])
    assert t.eog_ids == {257} and t.decode([256]) == "</s>"


def test_the_longest_special_token_in_bytes_is_cut_out_first() -> None:
    t = tokenizer([("[a]<", CONTROL), ("<\uff5c>", CONTROL)])
    assert t.encode("[a]<\uff5c>", special=True) == [LETTERS.index(c) for c in "[a]"] + [257]


# ---- damaged metadata ----

WRONG: list[Any] = [7, -1, True, 0.5, math.nan, "text", [], [1, 2], [0.5], [True], ["a", 1], np.ones(2000), [["x"]]]
RIGHT = {
    "tokens": [], "merges": [[]], "token_type": [], "pre": [], "model": [], "add_bos_token": [True],
    "eos_token_id": [7], "eot_token_id": [7], "eom_token_id": [7], "bos_token_id": [7], "fim_pad_token_id": [7],
}  # fmt: skip


@pytest.mark.parametrize("key", RIGHT)
@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_values_of_another_type_are_refused_in_one_line(key: str, value: Any) -> None:
    if any(type(value) is type(right) and value == right for right in RIGHT[key]):
        assert tokenizer(**{key: value})
        return
    with pytest.raises(FormatError) as error:
        tokenizer(**{key: value})
    assert "\n" not in error.value.message and len(error.value.message) < 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": None}, "no merges"),
        ({"tokens": None}, "no vocabulary"),
        ({"pre": "martian"}, "'martian'"),
        ({"model": "llama"}, "'llama' is not supported"),
        ({"eos_token_id": 256}, "eos_token_id is 256, expected an integer from 0 to 255"),
        ({"bos_token_id": 1 << 40}, "bos_token_id"),
        ({"token_type": [1] * 255}, "256 tokens but 255 token types"),
        ({"token_type": [1] * 257}, "256 tokens but 257 token types"),
        ({"merges": [f"{i} x{i}" for i in range(100_000)]}, "texts that are no tokens"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=re.escape(message)):
        tokenizer(**changes)


def test_types_that_llama_cpp_does_not_know_are_no_special_tokens() -> None:
    assert tokenizer(token_type=np.array([77, -5] * 128, np.int32)).encode("ab") == [LETTERS.index(c) for c in "ab"]


def test_a_vocabulary_that_claims_too_much_is_not_loaded(tmp_path: Path) -> None:
    """Millions of empty tokens in a file that is mostly a hole."""
    path = tmp_path / "sparse.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a"] * 2000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    data = bytearray(path.read_bytes())
    at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    count = MOST_ELEMENTS + 1
    data[at : at + 8] = count.to_bytes(8, "little")
    path.write_bytes(data[: at + 8])
    with path.open("r+b") as stream:
        stream.truncate(at + 8 + 8 * count)
    with pytest.raises(FormatError, match="at most"):
        Tokenizer.from_metadata(GGUFFile.open(path).metadata)
