"""Text to tokens and back, from the vocabulary that the GGUF itself carries.

The byte-pair merging is package `tokenizers`'; splitting off special tokens and the pre-tokenizer's regular
expression follow llama.cpp, so that both give the same ids (no Unicode normalization, unlike the original
tokenizers, as llama.cpp does none).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import tokenizers
from tokenizers import models
from tokenizers import pre_tokenizers as native

from fomoe_io.errors import FormatError
from fomoe_io.storage.metadata import Metadata
from fomoe_io.text.pre_tokenizers import DEFAULT, PRE_TOKENIZERS
from fomoe_io.text.special_tokens import ROLES, special_tokens

KEYS = "tokenizer.ggml."

MOST_ELEMENTS = 1 << 20
"""Of a list.  The largest vocabularies have 262,144 tokens and 515,000 merges; a sparse file may claim 30 million."""
MOST_SPELLED = 1 << 17
"""Texts that merges make and the vocabulary lacks: as many as if half of a large one had been cut away."""


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

    Parameters
    ----------
    tokens, merges : list of str
    types : list of int
        `tokenizer.ggml.token_type` of each token.
    pre : str
        Name of the pre-tokenizer.
    bos_id : int or None
    add_bos : bool or None
        None: as the pre-tokenizer has it.
    named : mapping of str to int
        Role (:data:`special_tokens.ROLES`) -> token, where the metadata names one.

    Attributes
    ----------
    vocab_size : int
    bos_id, eos_id : int or None
    add_bos : bool
        Whether the model wants a BOS in front of every text.
    eog_ids : frozenset of int
        Tokens that end a generation.
    notes : list of str
        What a user should know about the vocabulary.
    """

    def __init__(
        self,
        tokens: list[str],
        merges: list[str],
        types: list[int],
        *,
        pre: str,
        bos_id: int | None,
        add_bos: bool | None,
        named: Mapping[str, int],
    ) -> None:
        tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]  # as llama.cpp names them
        # the first of those that share a text is the one that encoding gives
        first = dict(zip(reversed(tokens), range(len(tokens) - 1, -1, -1), strict=True))
        special = special_tokens(tokens, types, first, named)
        self._tokens = tokens
        self.vocab_size = len(tokens)
        self.bos_id, self.eos_id = bos_id, named.get("eos")
        self.add_bos = PRE_TOKENIZERS[pre].add_bos if add_bos is None else add_bos
        self.eog_ids = special.ends
        self.notes = _notes(tokens, len(tokens) - len(first), special.mistyped)
        self._control = special.control
        self._whole = {i: tokens[i] for i in sorted(special.control | special.user_defined)}
        # the longest first, as llama.cpp cuts them out of a text
        self._special = sorted(
            ((text, i) for i, text in self._whole.items()), key=lambda item: -len(item[0].encode("utf-8", "replace"))
        )
        self._bpe = self._merging(first, merges, pre)

    def _merging(self, first: dict[str, int], merges: list[str], pre: str) -> tokenizers.Tokenizer:
        """Package tokenizers' BPE, with what merges make and the vocabulary lacks as tokens of its own.

        llama.cpp merges texts, whether or not they are tokens, and writes what is none at the end byte by byte, as far
        as bytes are tokens: the package knows only tokens, so such texts get ids beyond the vocabulary, `_spelled`.
        """
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges) if left and right]
        pairs = list(dict.fromkeys(pairs))  # of a pair that comes twice the first rank counts
        texts = {text for left, right in pairs for text in (left, right, left + right)} | _BYTES.keys()
        missing = sorted(texts - first.keys())
        if len(missing) > MOST_SPELLED:
            raise FormatError(f"the merges make {len(missing):,} texts that are no tokens of the vocabulary (damaged?)")
        vocabulary = first | {text: self.vocab_size + i for i, text in enumerate(missing)}
        self._spelled = {
            vocabulary[text]: [first[c] for c in text if c.isascii() and c in first] for text in missing
        }  # fmt: skip
        kind = PRE_TOKENIZERS[pre]
        try:
            bpe = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=kind.ignore_merges))
        except Exception as error:  # the package raises bare Exception
            raise FormatError(f"the model's vocabulary and merges do not fit: {error}") from None
        cuts = [native.Split(tokenizers.Regex(expression), "isolated") for expression in kind.expressions]
        bpe.pre_tokenizer = native.Sequence([*cuts, native.ByteLevel(add_prefix_space=False, use_regex=False)])
        return bpe

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Self:
        """From the `tokenizer.ggml.*` keys of a GGUF.

        Raises
        ------
        FormatError
            A kind of tokenizer that is not supported, or damaged metadata.
        """
        keys = Metadata(metadata)
        model, pre = keys.text(f"{KEYS}model", None), keys.text(f"{KEYS}pre", None)
        if model != "gpt2":
            raise FormatError(f"tokenizer model {model!r} is not supported (byte-level BPE, 'gpt2', is)")
        if (pre or DEFAULT) not in PRE_TOKENIZERS:
            raise FormatError(f"pre-tokenizer {pre!r} is not supported; known: {', '.join(PRE_TOKENIZERS)}")
        for name in ("tokens", "merges", "token_type"):
            if (count := keys.length(KEYS + name)) > MOST_ELEMENTS:
                raise FormatError(
                    f"metadata key {KEYS}{name} has {count:,} elements, at most {MOST_ELEMENTS:,} make sense"
                )
        tokens, merges = keys.texts(f"{KEYS}tokens", None), keys.texts(f"{KEYS}merges", None)
        if not tokens:
            raise FormatError(f"the model has no vocabulary (metadata key {KEYS}tokens)")
        if merges is None:
            raise FormatError(f"the model has no merges (metadata key {KEYS}merges)", hint="convert the model again")
        types = keys.integers(f"{KEYS}token_type", None)
        if types is not None and len(types) != len(tokens):
            raise FormatError(f"the vocabulary has {len(tokens)} tokens but {len(types)} token types")
        ids = {role: keys.integer(f"{KEYS}{role}_token_id", None, most=len(tokens) - 1) for role in ("bos", *ROLES)}
        bos_id = ids.pop("bos")
        tokenizer = cls(
            tokens,
            merges,
            [1] * len(tokens) if types is None else types.tolist(),
            pre=pre or DEFAULT,
            bos_id=bos_id,
            add_bos=keys.flag(f"{KEYS}add_bos_token", None),
            named={role: token for role, token in ids.items() if token is not None},
        )
        if not pre:
            tokenizer.notes.insert(
                0,
                f"the model does not name its pre-tokenizer ({KEYS}pre): llama.cpp's default cuts words, answers may "
                "be worse; convert the model again",
            )
        return tokenizer

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
                ids += self._spelt(self._bpe.encode(piece, add_special_tokens=False).ids)
        return ids

    def _spelt(self, ids: list[int]) -> Iterable[int]:
        """Tokens of the vocabulary only."""
        if max(ids, default=0) < self.vocab_size:
            return ids
        return [token for i in ids for token in self._spelled.get(i, (i,))]

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


def _notes(tokens: Sequence[str], duplicates: int, mistyped: Sequence[int]) -> list[str]:
    notes = []
    if duplicates:
        notes.append(f"{duplicates} tokens of the vocabulary have the text of another (damaged?)")
    if mistyped:
        names = ", ".join(tokens[i] for i in mistyped)
        notes.append(f"{names}: no control tokens by the file, but taken for such, as they end a turn")
    return notes


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
