"""Expert profiles: how often a model's router picks each expert, and over how many tokens that was counted.

Three formats are read: our own (JSON, written by `fomoe-layout profile`), the `.freq` files of pmerolla/fomoe, and
the per-expert counts of a llama.cpp importance matrix (`llama-imatrix -o FILE.gguf`).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import gguf
import numpy as np

from fomoe_io.errors import FormatError
from fomoe_io.storage.gguf import MAGIC, GGUFFile
from fomoe_io.system.files import write_atomically

FORMAT, VERSION = "fomoe-profile", 1
FREQ_MAGIC, FREQ_VERSION = 0x46524551, 1
LIMIT_BYTES = 64 << 20
"""A profile of 256 layers of 1024 experts takes 3 MB as text."""

MAX_LAYER, MAX_EXPERT, MAX_COUNT = 1 << 16, 1 << 16, 1 << 53
_FREQ_ENTRY = np.dtype([("layer", "<u2"), ("expert", "<u2"), ("frequency", "<f4")])
_IMATRIX_COUNTS = re.compile(r"blk\.(\d{1,5})\.ffn_(gate|up|down|gate_up)_exps(\.weight)?\.counts")


@dataclass(frozen=True, slots=True)
class Profile:
    """Router picks per layer and expert.

    Attributes
    ----------
    tokens : int
        Tokens they were counted over.
    counts : dict of int to numpy.ndarray
        Layer -> int64 [experts].  Arrays of a sparse format end with the last expert seen.
    source : str
        Name of the file they came from.
    fingerprint : str or None
        Of the model they were counted on, where the format has it.
    sparse : bool
        Whether experts never seen are left out, so that the arrays' lengths say nothing.
    """

    tokens: int
    counts: dict[int, np.ndarray]
    source: str
    fingerprint: str | None = None
    sparse: bool = False

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a profile of any of the three formats.

        Raises
        ------
        FormatError
            When it is none of them, or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FormatError(f"profile {path} does not exist", hint="fomoe-layout profile MODEL -f TEXT -o FILE")
        with path.open("rb") as stream:
            start = stream.read(4)
        if start == MAGIC:
            return cls._of_imatrix(path)
        if path.stat().st_size > LIMIT_BYTES:
            raise FormatError(f"profile {path} has {path.stat().st_size:,} bytes, at most {LIMIT_BYTES:,} make sense")
        if start == struct.pack("<I", FREQ_MAGIC):
            return cls._of_freq(path)
        return cls._of_json(path)

    @classmethod
    def _of_json(cls, path: Path) -> Self:
        try:
            body = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise FormatError(
                f"{path} is no profile: neither {FORMAT}, nor .freq, nor an importance matrix in GGUF",
                hint="fomoe-layout profile MODEL -f TEXT -o FILE",
            )
        if body.get("version") != VERSION:
            raise FormatError(f"{path} has profile version {body.get('version')!r}, this program reads {VERSION}")
        layers, tokens, fingerprint = body.get("picks"), body.get("tokens"), body.get("fingerprint")
        if not isinstance(layers, dict) or not isinstance(fingerprint, str | None):
            raise FormatError(f"{path}: a field is missing or of the wrong kind (damaged?)")
        counts = {_layer_number(key, path): _counts(picks, f"{path}: layer {key}") for key, picks in layers.items()}
        return cls(_tokens(tokens, path), counts, path.name, fingerprint)

    @classmethod
    def _of_freq(cls, path: Path) -> Self:
        raw = path.read_bytes()
        if len(raw) < 16:
            raise FormatError(f"{path}: the header is cut off")
        _, version, layers, entries = struct.unpack_from("<4I", raw)
        if version != FREQ_VERSION:
            raise FormatError(f"{path} has .freq version {version}, expected {FREQ_VERSION}")
        if len(raw) != 16 + entries * _FREQ_ENTRY.itemsize:
            raise FormatError(f"{path} has {len(raw):,} bytes, its header of {entries:,} entries says otherwise")
        table = np.frombuffer(raw, _FREQ_ENTRY, entries, 16)
        frequency = table["frequency"].astype(np.float64)
        if not entries or not (np.isfinite(frequency) & (frequency > 0) & (frequency <= 1)).all():
            raise FormatError(f"{path}: frequencies are missing, or not between 0 and 1")
        if table["layer"].max() >= layers:
            raise FormatError(f"{path}: names layer {table['layer'].max()} of {layers}")
        tokens = _tokens_behind(frequency)
        counts = {}
        for layer in np.unique(table["layer"]):
            of_layer = table["layer"] == layer
            picks = np.zeros(int(table["expert"][of_layer].max()) + 1, np.int64)
            picks[table["expert"][of_layer]] = np.rint(frequency[of_layer] * tokens)
            counts[int(layer)] = picks
        return cls(tokens, counts, path.name, sparse=True)

    @classmethod
    def _of_imatrix(cls, path: Path) -> Self:
        file = GGUFFile.open(path)
        chunks, chunk_tokens = (file.metadata.integer(f"imatrix.chunk_{key}", 0) for key in ("count", "size"))
        counts: dict[int, np.ndarray] = {}
        for tensor in file.tensors.values():
            match = _IMATRIX_COUNTS.fullmatch(tensor.name)
            if match is None or int(match[1]) in counts:
                continue
            if tensor.type != gguf.GGMLQuantizationType.F32 or tensor.bytes > 4 * MAX_EXPERT:
                raise FormatError(f"{path}: {tensor.name} has type {tensor.type.name} and shape {list(tensor.shape)}")
            values = np.fromfile(file.paths[tensor.file], "<f4", tensor.bytes // 4, offset=tensor.offset)
            counts[int(match[1])] = _counts(values.astype(np.float64).tolist(), f"{path}: {tensor.name}")
        if not counts or not chunks or not chunk_tokens:
            raise FormatError(
                f"{path} is a GGUF, but no importance matrix with expert counts",
                hint="llama-imatrix -m MODEL.gguf -f TEXT -o FILE.gguf (a version that writes GGUF)",
            )
        return cls(_tokens(chunks * chunk_tokens, path), counts, path.name)

    def save(self, path: Path) -> None:
        """Write our own format, atomically."""
        picks = {str(layer): values.tolist() for layer, values in sorted(self.counts.items())}
        body = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, "tokens": self.tokens}
        text = json.dumps(body | {"picks": picks}, separators=(",", ":")).replace('],"', '],\n"')
        write_atomically(path, text.encode() + b"\n")

    def fitted(self, experts: Mapping[int, int]) -> dict[int, np.ndarray]:
        """Counts of a model's layers, padded to its experts; layers that were never counted are left out.

        Parameters
        ----------
        experts : mapping of int to int
            Layer -> experts.

        Raises
        ------
        FormatError
            When the profile names a layer or an expert that the model lacks.
        """
        result = {}
        for layer, picks in self.counts.items():
            if layer not in experts:
                raise FormatError(f"profile {self.source} has layer {layer}, the model has no experts there")
            wrong_length = len(picks) > experts[layer] if self.sparse else len(picks) != experts[layer]
            if wrong_length:
                raise FormatError(
                    f"profile {self.source} has {len(picks)} experts in layer {layer}, the model {experts[layer]}",
                    hint="use a profile of this model: fomoe-layout profile MODEL -f TEXT -o FILE",
                )
            if picks.any():
                result[layer] = np.pad(picks, (0, experts[layer] - len(picks)))
        return result

    def frequencies(self, experts: Mapping[int, int]) -> dict[int, np.ndarray]:
        """Picks per token, float64 [experts] a layer, shrunk towards uniform: see :func:`shrunk`."""
        return {layer: shrunk(picks, self.tokens) for layer, picks in self.fitted(experts).items()}


def shrunk(counts: np.ndarray, tokens: int) -> np.ndarray:
    """Picks per token with one imagined pick more for every expert, scaled back to the picks that there were.

    A short profile leaves half of the experts at zero by chance; add-one (a uniform Dirichlet prior) keeps them
    comparable and fades as the profile grows.
    """
    total = counts.sum()
    return (counts + 1) * (total / (total + len(counts)) / tokens)


def _tokens(value: Any, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_COUNT:
        raise FormatError(f"{path}: token count {value!r}, expected a positive integer")
    return value


def _layer_number(key: str, path: Path) -> int:
    if re.fullmatch(r"\d{1,5}", key) is None or int(key) > MAX_LAYER:
        raise FormatError(f"{path}: layer {key[:20]!r} is no layer number")
    return int(key)


def _counts(values: Any, where: str) -> np.ndarray:
    """int64 counts from a list of whole numbers."""
    if not isinstance(values, list) or not 0 < len(values) <= MAX_EXPERT:
        raise FormatError(f"{where}: expected a list of 1 to {MAX_EXPERT} counts")
    if not all(isinstance(v, int | float) and 0 <= v < MAX_COUNT and v == int(v) for v in values):
        raise FormatError(f"{where}: a count is not a whole number from 0")
    return np.array(values, np.float64).astype(np.int64)


def _tokens_behind(frequency: np.ndarray) -> int:
    """Tokens of a .freq file, which does not say: the smallest count that makes all frequencies whole counts.

    The rarest expert seen was seen once, or a few times; float32 leaves an error of 1e-7 of a count's size.
    """
    rarest = frequency.min()
    for picks in range(1, 9):
        tokens = max(1, round(picks / rarest))
        counts = frequency * tokens
        if np.abs(counts - np.rint(counts)).max() < 0.01:
            return tokens
    return max(1, round(1 / rarest))
