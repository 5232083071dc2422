"""The tokens' embeddings, read from the file a row at a time, in the form in which they are sent to a device."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import gguf
import numpy as np

if TYPE_CHECKING:
    from fomoe_io.gpu.arena import EmbeddingTable
    from fomoe_io.open_model import OpenModel


class EmbeddingReader:
    """Reads rows of a table.

    Parameters
    ----------
    opened : OpenModel
    table : EmbeddingTable
    file : int
        Descriptor of the file that holds it.
    offset : int
        Where in the file it begins.
    """

    def __init__(self, opened: OpenModel, table: EmbeddingTable, file: int, offset: int) -> None:
        self._opened, self._table, self._file, self._offset = opened, table, file, offset

    def read(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Fill uint8 rows [tokens, row_bytes] with the embeddings of int32 ids [tokens].

        Raises
        ------
        ReadError
        """
        for row, token in zip(rows, ids.tolist(), strict=True):
            row[:] = self._row(token)

    def _row(self, token: int) -> np.ndarray:
        table = self._table
        try:
            raw = os.pread(self._file, table.file_row_bytes, self._offset + token * table.file_row_bytes)
        except OSError as error:
            raise self._opened.embedding_error(error.errno or errno.EIO) from error
        if len(raw) != table.file_row_bytes:
            raise self._opened.embedding_error(errno.ENODATA)
        values = np.frombuffer(raw, np.uint8)
        if table.row_bytes != table.file_row_bytes:
            values = gguf.quants.dequantize(values, gguf.GGMLQuantizationType(table.type)).view(np.uint8)
        return values.reshape(-1)
