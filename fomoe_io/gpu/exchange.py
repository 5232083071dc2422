"""Devices that compute every layer together: which rows each makes, and how all get what each has made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fomoe_io.errors import FormatError
from fomoe_io.gpu import kernels
from fomoe_io.gpu.arena import Arena, DeviceMatrix, LaunchSpec, Mailbox, Share

if TYPE_CHECKING:
    from fomoe_io.models.shape import Shape

LEAST_BYTES = 4 << 20
"""Of the weights that one vector is multiplied with: a card of 320 GB/s reads half of them in the 7 us that an exchange
takes, and faster ones in less."""

LEAST_ROWS = kernels.MANY_ROWS
"""Of a device's rows of them: fewer don't fill it, so that making half of them takes as long as making all."""


def check_share(s: Shape, count: int) -> None:
    """FormatError when the rows of a model's experts can't be divided among so many devices."""
    for name, value, unit in (("expert width", s.hidden, 32), ("model width", s.columns, 1)):
        if value % (unit * count):
            raise FormatError(
                f"{count} devices can't share experts of {name} {value}: it is no multiple of {unit * count}",
                hint="-sm layer",
            )


class Exchange:
    """What devices exchange in a token's run, or in a batch's (kernels/gather.h).

    Parameters
    ----------
    share : Share
    mailbox : Mailbox

    Attributes
    ----------
    share : Share
    bytes : int
        What all exchanges so far need; alike on all devices.
    """

    def __init__(self, share: Share, mailbox: Mailbox) -> None:
        self.share, self._mailbox, self._arena = share, mailbox, Arena()
        self._places: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        """Of the memory behind outbox and inbox."""
        return self._arena.bytes

    def common(self, name: str, nbytes: int) -> tuple[int, int]:
        """Addresses, in outbox and inbox, of words of a batch; what has the same name shares them."""
        if name not in self._places:
            self._places[name] = self._arena.take(nbytes)
        return self.share.outbox + self._places[name], self.share.inbox + self._places[name]

    def own_rows(self, matrices: Sequence[DeviceMatrix]) -> list[slice]:
        """Of each of the matrices that are multiplied at once the rows made here: all, where dividing gains nothing."""
        share = self.share
        divided = [m for m in matrices if m.rows % (share.count * kernels.mat_vec_rows(m.kernel)) == 0]
        nbytes, rows = sum(m.rows * m.row_bytes for m in divided), sum(m.rows for m in divided)
        if share.count == 1 or nbytes < LEAST_BYTES or rows < LEAST_ROWS * share.count:
            divided = []
        return [share.of(m.rows) if m in divided else slice(0, m.rows) for m in matrices]

    def floats(self, vectors: Sequence[tuple[int, int]]) -> list[LaunchSpec]:
        """All of vectors, (address, columns) each, of which every device has made its own columns."""
        if self.share.count == 1:
            return []
        most = kernels.MAT_VEC_MANY
        return [self._floats(vectors[i : i + most], most) for i in range(0, len(vectors), most)]

    def _floats(self, vectors: Sequence[tuple[int, int]], most: int) -> LaunchSpec:
        words, unused = [columns // self.share.count for _, columns in vectors], most - len(vectors)
        pointers = [address for address, _ in vectors] + [None] * unused
        return self._launch("gather_floats", sum(words), *pointers, *words, *[0] * unused)

    def hidden(self, q8: int, floats: int | None, columns: int, pairs: int) -> list[LaunchSpec]:
        """All of what gate and up have made of each pair: floats, where there are any, or Q8 rows."""
        if self.share.count == 1:
            return []
        own = columns // self.share.count
        words = pairs * (own if floats is not None else own // 4 + own // 16)
        return [self._launch("gather_hidden", words, q8, floats, columns, pairs)]

    def _launch(self, kernel: str, words: int, *arguments: Any) -> LaunchSpec:
        """With words of its own, so many of each device, which are never reset."""
        share, grid = self.share, kernels.gather_grid(words)
        place = self._arena.take(8 * words * share.count)
        where = (share.outbox + place, share.inbox + place, self._mailbox.run, self._mailbox.stop)
        return LaunchSpec(kernel, grid, [*arguments, *where, share.index, share.count, grid[0]])
