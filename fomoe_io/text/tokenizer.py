"""Text to tokens and back, from the vocabulary that the GGUF itself carries.

The byte-pair merging is package `tokenizers`'; splitting off special tokens and the pre-tokenizer's regular
expression follow llama.cpp, so that both give the same ids (no Unicode normalization, unlike the original
tokenizers, as llama.cpp does none).
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any, Self

import tokenizers
from tokenizers import models, pre_tokenizers

from fomoe_io.errors import FormatError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "qwen2": _QWEN2,
    "qwen35": _QWEN35,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
}
"""Regular expressions by `tokenizer.ggml.pre`, from the models' own tokenizer files."""

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""`tokenizer.ggml.token_type` of tokens that are text of their own, not byte-level pieces."""

_END_TEXTS = (
    "<|endoftext|>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endofturn|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "</s>", "<EOT>", "_<EOT>",
)  # fmt: skip
"""Tokens that end a generation whatever the metadata says: llama.cpp's list."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte -> the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


_BYTES = _byte_alphabet()


class Tokenizer:
    """A byte-level BPE tokenizer.  Use :meth:`from_metadata`.

    Attributes
    ----------
    vocab_size : int
    bos_id, eos_id : int or None
    add_bos : bool
        Whether the model wants a BOS in front of every text.
    eog_ids : frozenset of int
        Tokens that end a generation.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        merges: Sequence[str],
        types: Sequence[int],
        *,
        pre: str,
        bos_id: int | None,
        eos_id: int | None,
        add_bos: bool,
        end_ids: Sequence[int],
    ) -> None:
        self._tokens = tokens
        self.vocab_size = len(tokens)
        self.bos_id, self.eos_id, self.add_bos = bos_id, eos_id, add_bos
        whole = {i: tokens[i] for i, kind in enumerate(types) if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)}
        self._whole = whole
        self._control = frozenset(i for i in whole if types[i] != _USER_DEFINED)
        # the longest first, as llama.cpp cuts them out of a text
        self._special = sorted(((text, i) for i, text in whole.items() if text), key=lambda item: -len(item[0]))
        by_text = {text: i for i, text in whole.items()}
        self.eog_ids = frozenset(
            [*end_ids, *([eos_id] if eos_id is not None else []), *(by_text[t] for t in _END_TEXTS if t in by_text)]
        )
        vocabulary = {text: i for i, text in enumerate(tokens) if i not in whole}
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        try:
            bpe = models.BPE(vocabulary, pairs, ignore_merges=pre in ("llama-bpe", "llama3"))
        except Exception as error:  # the package raises bare Exception
            raise FormatError(f"the model's vocabulary and merges do not fit: {error}") from None
        self._bpe = tokenizers.Tokenizer(bpe)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(PRE_TOKENIZERS[pre]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Self:
        """From the `tokenizer.ggml.*` keys of a GGUF.

        Raises
        ------
        FormatError
            A kind of tokenizer that is not supported, or damaged metadata.
        """
        model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
        if model != "gpt2":
            raise FormatError(f"tokenizer model {model!r} is not supported (byte-level BPE, 'gpt2', is)")
        if pre not in PRE_TOKENIZERS:
            raise FormatError(f"pre-tokenizer {pre!r} is not supported; known: {', '.join(PRE_TOKENIZERS)}")
        tokens = metadata.get("tokenizer.ggml.tokens")
        if tokens is None:
            raise FormatError("the model has no vocabulary (metadata key tokenizer.ggml.tokens)")
        merges = metadata.get("tokenizer.ggml.merges")
        types = metadata.get("tokenizer.ggml.token_type")
        kinds = [1] * len(tokens) if types is None else [int(kind) for kind in types]
        if len(kinds) != len(tokens):
            raise FormatError(f"the vocabulary has {len(tokens)} tokens but {len(kinds)} token types")

        def token_id(key: str) -> int | None:
            value = metadata.get(f"tokenizer.ggml.{key}_token_id")
            return int(value) if value is not None and 0 <= int(value) < len(tokens) else None

        ends = [i for i in (token_id("eot"), token_id("eom")) if i is not None]
        return cls(
            tokens,
            [] if merges is None else merges,
            kinds,
            pre=pre,
            bos_id=token_id("bos"),
            eos_id=token_id("eos"),
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
            end_ids=ends,
        )

    def _split(self, text: str, special: bool) -> list[str | int]:
        """Cut special tokens out of a text; user-defined ones always, control tokens when `special`."""
        pieces: list[str | int] = [text]
        for token, i in self._special:
            if (not special and i in self._control) or token not in text:
                continue
            cut: list[str | int] = []
            for piece in pieces:
                if isinstance(piece, int):
                    cut.append(piece)
                    continue
                first, *others = piece.split(token)
                cut.append(first)
                for other in others:
                    cut += [i, other]
            pieces = [piece for piece in cut if piece != ""]
        return pieces

    def encode(self, text: str, *, special: bool = False, add_bos: bool = False) -> list[int]:
        """Token ids of a text.

        Parameters
        ----------
        text : str
        special : bool
            Read control tokens such as `<|im_start|>` as tokens, not as text.
        add_bos : bool
            Put a BOS in front when the model has one.
        """
        ids: list[int] = [self.bos_id] if add_bos and self.bos_id is not None else []
        for piece in self._split(text, special):
            if isinstance(piece, int):
                ids.append(piece)
            elif piece:
                ids += self._bpe.encode(piece, add_special_tokens=False).ids
        return ids

    def decode_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; of control tokens nothing unless `special`."""
        if token in self._control and not special:
            return b""
        text = self._tokens[token]
        if token in self._whole:
            return text.encode()
        return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in text)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens; bytes that are no UTF-8 become replacement characters."""
        return b"".join(self.decode_bytes(i, special=special) for i in ids).decode("utf-8", "replace")

    def token_text(self, token: int) -> str:
        """A token as the vocabulary writes it."""
        return self._tokens[token]


class StreamDecoder:
    """Decodes one token after the other, holding back bytes until a character is whole."""

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """What can be printed after this token."""
        return self._decoder.decode(self._tokenizer.decode_bytes(token, special=self._special))

    def finish(self) -> str:
        """What is left at the end."""
        return self._decoder.decode(b"", final=True)
