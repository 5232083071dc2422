"""Texts are cut into words as llama.cpp cuts them: pieces.json.xz has what it made of some (tools/pieces.py)."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from fomoe_io.text.pre_tokenizers import PRE_TOKENIZERS, as_llama_cpp
from fomoe_io.text.tokenizer import _BYTES
from tests.unit.test_vocabularies import NORMAL, cuts, tokenizer

LLAMA_CPP: dict[str, Any] = json.loads(lzma.decompress(Path(__file__).with_name("pieces.json.xz").read_bytes()))
OURS_ALONE = {"gpt2"}


@pytest.mark.parametrize("name", LLAMA_CPP["names"])
def test_words_are_llama_cpps(name: str) -> None:
    t, expected = tokenizer([("hello", NORMAL)], pre=name, bos_token_id=0), LLAMA_CPP["names"][name]
    assert t.add_bos == expected["add_bos"]
    assert (len(t.encode("hello")) == 1) == expected["ignore_merges"]
    for text, ends in zip(LLAMA_CPP["texts"], expected["ends"], strict=True):
        words = [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
        assert [bytes(_BYTES[c] for c in word).decode() for word in cuts(t, text)] == words, text


def test_every_name_has_been_compared() -> None:
    assert PRE_TOKENIZERS.keys() - OURS_ALONE == LLAMA_CPP["names"].keys()


@pytest.mark.parametrize("category", LLAMA_CPP["categories"])
def test_categories_are_llama_cpps(category: str) -> None:
    """Package tokenizers knows a newer Unicode.  No plane from the fourth to the thirteenth is in use."""
    codes = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000)]
    characters = "".join(map(chr, codes))
    cut = Split(Regex(as_llama_cpp(rf"\p{{{category}}}+")), "isolated").pre_tokenize_str(characters)
    ends = [codes[end] for _, (_, end) in cut[:-1]]
    assert ends == LLAMA_CPP["categories"][category]
