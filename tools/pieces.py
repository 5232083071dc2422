"""Pre-tokenizers against llama.cpp's: tools/llama_pieces.cpp says what that makes of a text.

python tools/pieces.py PROGRAM compare 20000 SEED [VOCABULARY.gguf ...]   prints what differs, of so many texts each
python tools/pieces.py PROGRAM write VERSION                  writes tests/unit/pieces.json.xz

Without a vocabulary those of byte pairs are written, one for each name that fomoe_io takes.
"""

# ruff: noqa: RUF001
from __future__ import annotations

import json
import lzma
import random
import struct
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from fomoe_io.storage.gguf import GGUFFile
from fomoe_io.text.pre_tokenizers import PRE_TOKENIZERS
from fomoe_io.text.tokenizer import _BYTES, Tokenizer

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = ROOT / "tests" / "unit" / "pieces.json.xz"
TEXTS, SEED = 400, 11

OURS_ALONE = {"gpt2"}
"""Names that llama.cpp does not know."""

CATEGORIES = {"N": 2, "L": 4, "M": 16, "P": 32, "S": 64}
"""Bits of llama.cpp's, those that expressions name."""

BLANKS = (
    *" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff\u180e",
    "  ", "   ", "\r\n", "\n\n", " \n", "\n ",
)  # fmt: skip
ENDINGS = (
    "s",
    "t",
    "re",
    "ve",
    "m",
    "ll",
    "d",
    "S",
    "T",
    "RE",
    "Re",
    "rE",
    "vE",
    "M",
    "lL",
    "D",
    "x",
    "\u017f",
    "r",
    "",
)
DIGITS = ("0123456789", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "０１２３４５６７８９", "𝟎𝟏𝟐𝟑𝟒", "²³¹½¼Ⅷ①㊀")
WORDS = (
    "a", "B", "the", "hello", "Hello", "WORLD", "iPhone", "éclair", "É", "Ünï", "straße", "ǅ", "Ǆ", "ª", "ſ", "\u212a",
    "中文", "日本語", "ひらがな", "カナ", "한국어", "ㄱ", "אב", "العربية", "\u064e", "हिन्दी", "क्षि", "ไทย", "e\u0301",
    "ー", "\u0301", "a\u0300\u0327", "👩\u200d👩\u200d👧", "🇩🇪", "👍🏽", "❤\ufe0f", "😀", "𝔘", "\U00020000", "\ud7ff",
    "\ue000", "\U0010ffff", "\uffff", "\ufffd", "\ufdd0", "\U00013954", "\U00010d43", "\u2427",
)  # fmt: skip
MARKS = (*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~€™。、！「—–…‘’·•\u0600\u00ad", "...", "//", "[x]")
SPECIAL = ("<|im_start|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<think>")


def _by_category() -> dict[str, list[str]]:
    """All characters that texts can have."""
    found: dict[str, list[str]] = {}
    for code in [*range(0xD800), *range(0xE000, 0x110000)]:
        found.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    return found


_ALL = _by_category()


def _part(r: random.Random) -> str:
    kinds = [
        (16, lambda: r.choice(BLANKS)),
        (8, lambda: r.choice("'\u2019") + r.choice(ENDINGS)),
        (10, lambda: "".join(r.choices(r.choice(DIGITS), k=r.randint(1, 12)))),
        (20, lambda: r.choice(WORDS)),
        (12, lambda: r.choice(MARKS)),
        (3, lambda: r.choice(SPECIAL)),
        (21, lambda: "".join(r.choice(_ALL[r.choice(list(_ALL))]) for _ in range(r.randint(1, 3)))),
        (5, lambda: "".join(chr(r.randrange(128)) for _ in range(r.randint(1, 3)))),
        (5, lambda: r.choice("abcXYZ") * r.randint(1, 4)),
    ]
    return r.choices([make for _, make in kinds], [weight for weight, _ in kinds])[0]()


def texts(count: int, seed: int) -> list[str]:
    """Random ones of what expressions tell apart."""
    r = random.Random(seed)
    found = ["".join(_part(r) for _ in range(r.randint(1, 16))) for _ in range(count)]
    return [text + r.choice(BLANKS) if r.random() < 0.2 else text for text in found]


def write_vocabulary(path: Path, pre: str) -> None:
    """Every byte, every pair of bytes, some words that no merge makes, and special tokens."""
    letters = list(_BYTES)
    pairs = [(a, b) for a in letters for b in letters]
    words = ["Ġthe", "hello", "Hello", "WORLD", "...", "ĠĠĠ", "123"]
    tokens = [*letters, *(a + b for a, b in pairs), *words, *SPECIAL]
    w = gguf.GGUFWriter(path, "llama")
    for add in (w.add_context_length, w.add_embedding_length, w.add_feed_forward_length):
        add(64)
    w.add_block_count(1)
    w.add_head_count(1)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    w.add_token_types([1] * (len(tokens) - len(SPECIAL)) + [3] * (len(SPECIAL) - 2) + [2, 4])
    w.add_token_merges([f"{a} {b}" for a, b in pairs])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def llama_cpps(program: str, vocabulary: Path, asked: list[str]) -> Iterator[Any]:
    """Whether it adds a BOS; then (words, tokens, tokens with special ones) of each text."""
    encoded = [text.encode() for text in asked]
    data = b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    out = memoryview(subprocess.run([program, vocabulary], input=data, stdout=subprocess.PIPE, check=True).stdout)
    at = 0

    def take(size: int) -> memoryview:
        nonlocal at
        at += size
        return out[at - size : at]

    def number() -> int:
        return int(struct.unpack("<I", take(4))[0])

    yield bool(number())
    for _ in asked:
        words = [bytes(take(number())).decode() for _ in range(number())]
        yield words, *(np.frombuffer(take(4 * number()), np.int32).tolist() for _ in range(2))


def words_of(t: Tokenizer, text: str) -> list[str]:
    """Before the merging, in GPT-2's alphabet."""
    assert t._bpe.pre_tokenizer is not None
    parts = [part for part in t._split(text, special=False) if isinstance(part, str)]
    return [word for part in parts for word, _ in t._bpe.pre_tokenizer.pre_tokenize_str(part)]


def compare(program: str, vocabulary: Path, asked: list[str]) -> None:
    """Print what differs, and how much."""
    t = Tokenizer.from_metadata(GGUFFile.open(vocabulary).metadata)
    results = llama_cpps(program, vocabulary, asked)
    if next(results) != t.add_bos:
        print(f"  add_bos is {t.add_bos}")
    different = 0
    for text, theirs in zip(asked, results, strict=True):
        ours = words_of(t, text), t.encode(text), t.encode(text, special=True)
        if ours == theirs:
            continue
        different += 1
        if different <= 5:
            print(f"  {text!a}\n    ours   {ours}\n    theirs {theirs}")
    print(f"{vocabulary.name}: {len(asked)} texts, {different} differ", flush=True)


def _ends(words: list[str]) -> list[int]:
    """Where words end, in characters."""
    lengths = [len(bytes(_BYTES[c] for c in word).decode()) for word in words]
    return np.cumsum(lengths).tolist()


def _ranges(categories: np.ndarray, bit: int) -> list[int]:
    """Where runs of a category begin and end, in turn."""
    is_in = np.concatenate([[False], (categories & bit) != 0, [False]])
    return np.flatnonzero(is_in[1:] != is_in[:-1]).tolist()


def write(program: str, version: str, folder: Path) -> None:
    """What llama.cpp makes of the texts, for the tests."""
    asked = [text for text in texts(TEXTS, SEED) if "<think>" not in text]  # would be cut out before
    names: dict[str, Any] = {}
    for pre in PRE_TOKENIZERS.keys() - OURS_ALONE:
        path = folder / "vocabulary.gguf"
        write_vocabulary(path, pre)
        adds_bos, *results = llama_cpps(program, path, ["hello", *asked])
        ends = [_ends(words) for words, _, _ in results[1:]]
        names[pre] = {"add_bos": adds_bos, "ignore_merges": len(results[0][1]) == 1, "ends": ends}
    raw = subprocess.run([program], stdout=subprocess.PIPE, check=True).stdout
    categories = {name: _ranges(np.frombuffer(raw, np.uint16), bit) for name, bit in CATEGORIES.items()}
    found = {"llama.cpp": version, "texts": asked, "names": dict(sorted(names.items())), "categories": categories}
    WRITTEN.write_bytes(lzma.compress(json.dumps(found).encode(), preset=9))


def main() -> None:
    """See the head of the file."""
    program, what, *more = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        if what == "write":
            write(program, more[0], Path(folder))
            return
        asked = texts(int(more[0]), int(more[1]))
        for vocabulary in more[2:]:
            compare(program, Path(vocabulary), asked)
        for pre in () if more[2:] else PRE_TOKENIZERS.keys() - OURS_ALONE:
            write_vocabulary(path := Path(folder) / f"{pre}.gguf", pre)
            compare(program, path, asked)


if __name__ == "__main__":
    main()
