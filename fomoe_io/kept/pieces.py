"""What is known, as a tree: blocks of tokens with their KV, and checkpoints that hang on them.

A path from the root is a prompt.  Blocks are shared by all prompts that begin with them; a checkpoint is a place where
a session can stand: the tokens after its last whole block, and what is recurrent.
"""

from __future__ import annotations

import itertools
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fomoe_io.ram_budget import KEPT_BLOCK_TOKENS

BLOCK_TOKENS = KEPT_BLOCK_TOKENS
"""A checkpoint repeats the KV of the tokens after its last block: little beside a recurrent state."""

TOKEN_BYTES = 4

Tokens = array  # of type "i"


class Piece:
    """A block, or a checkpoint.

    Attributes
    ----------
    parent : Piece or None
        The block before it; None of the root.
    tokens : bytes
        Its own, as int32.
    end : int
        Position after them.
    is_checkpoint : bool
    key : str
        Of all tokens up to its end.
    rows : numpy.ndarray or None
        KV of its own tokens, when it is in memory.
    recurrent : numpy.ndarray or None
        Of a checkpoint, when it is in memory.
    file : Path or None
        Where both are on the drive.
    used : int
        When it was last useful: a number that grows.
    seconds : float
        The same by the clock.
    text_end : (int, int) or None
        Bytes of all tokens up to here as text, and their hash, of a checkpoint after sampled tokens.
    children, checkpoints : dict
        By their own tokens.
    """

    __slots__ = (
        "checkpoints", "children", "end", "file", "is_checkpoint", "key", "parent", "recurrent", "rows", "seconds",
        "text_end", "tokens", "used",
    )  # fmt: skip

    def __init__(self, parent: Piece | None, tokens: bytes, *, is_checkpoint: bool = False) -> None:
        self.parent, self.tokens, self.is_checkpoint = parent, tokens, is_checkpoint
        self.end: int = (0 if parent is None else parent.end) + len(tokens) // TOKEN_BYTES
        self.key: str = "" if parent is None else xxhash.xxh3_128_hexdigest(parent.key.encode() + tokens)
        self.rows: np.ndarray | None = None
        self.recurrent: np.ndarray | None = None
        self.file: Path | None = None
        self.used, self.seconds = 0, 0.0
        self.text_end: tuple[int, int] | None = None
        self.children: dict[bytes, Piece] = {}
        self.checkpoints: dict[bytes, Piece] = {}

    @property
    def count(self) -> int:
        """Its own tokens."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def first(self) -> int:
        """Position of the first of them."""
        return self.end - self.count

    @property
    def memory_bytes(self) -> int:
        """What it holds in memory."""
        return sum(part.nbytes for part in (self.rows, self.recurrent) if part is not None)

    def path(self) -> list[Piece]:
        """The blocks up to it, itself included, without the root."""
        found: list[Piece] = []
        piece: Piece | None = self
        while piece is not None and piece.parent is not None:
            found.append(piece)
            piece = piece.parent
        return found[::-1]

    def all_tokens(self) -> Any:
        """From the beginning on: an array."""
        found = array("i")
        for piece in self.path():
            found.frombytes(piece.tokens)
        return found

    def below(self) -> list[Piece]:
        """Itself and all that depends on it, each after what it depends on."""
        found, left = [], [self]
        while left:
            piece = left.pop()
            found.append(piece)
            left += [*piece.checkpoints.values(), *piece.children.values()]
        return found

    def hang(self, tokens: bytes, *, is_checkpoint: bool) -> Piece:
        """The block or checkpoint with these tokens after this block; made when it is not there."""
        pieces = self.checkpoints if is_checkpoint else self.children
        if tokens not in pieces:
            pieces[tokens] = Piece(self, tokens, is_checkpoint=is_checkpoint)
        return pieces[tokens]

    @property
    def is_attached(self) -> bool:
        """Whether its parent knows it."""
        if self.parent is None:
            return True
        return (self.parent.checkpoints if self.is_checkpoint else self.parent.children).get(self.tokens) is self

    def cut_off(self) -> None:
        """Out of the tree, with all that depends on it."""
        if self.parent is not None:
            (self.parent.checkpoints if self.is_checkpoint else self.parent.children).pop(self.tokens, None)


def walk(root: Piece, tokens: Any) -> list[Piece]:
    """The blocks that a prompt begins with, the root first."""
    found, piece = [root], root
    for first in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        child = piece.children.get(tokens[first : first + BLOCK_TOKENS].tobytes())
        if child is None:
            break
        found.append(child)
        piece = child
    return found


def extend(root: Piece, tokens: Any) -> list[Piece]:
    """The same with all of the prompt's whole blocks: those that were missing are made."""
    found, piece = [root], root
    for first in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        piece = piece.hang(tokens[first : first + BLOCK_TOKENS].tobytes(), is_checkpoint=False)
        found.append(piece)
    return found


def common(left: Any, right: Any) -> int:
    """How many tokens two arrays begin with alike."""
    most = min(len(left), len(right))
    if left[:most] == right[:most]:
        return most
    differs = np.frombuffer(left, np.int32, most) != np.frombuffer(right, np.int32, most)
    return int(differs.argmax())


def best_checkpoint(path: list[Piece], tokens: Any, most: int) -> Piece | None:
    """The last checkpoint of a prompt that lies on its way, within its first `most` tokens."""
    for block in reversed(path):
        rest = tokens[block.end : block.end + BLOCK_TOKENS].tobytes()
        fitting = [c for c in block.checkpoints.values() if c.end <= most and rest.startswith(c.tokens)]
        if fitting:
            return max(fitting, key=lambda c: c.end)
    return None


def best_cut(path: list[Piece], tokens: Any, most: int) -> tuple[Piece, int]:
    """(piece, tokens of it): how far rows reach, for a model that can stand anywhere."""
    last = path[-1]
    rest, best = tokens[last.end : min(last.end + BLOCK_TOKENS, most)], (last, last.count)
    longest = 0
    for piece in itertools.chain(last.children.values(), last.checkpoints.values()):
        own = array("i")
        own.frombytes(piece.tokens)
        reach = common(own, rest)
        if reach > longest:
            longest, best = reach, (piece, reach)
    return best
