"""Models that are elsewhere: a header alone, by HTTP ranges into a sparse file; or the whole, resumed after a cut."""

from __future__ import annotations

import errno
import fcntl
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fomoe_io.cli.progress import Progress
from fomoe_io.errors import FormatError, UsageError
from fomoe_io.storage.gguf import GGUFFile, read_metadata
from fomoe_io.storage.gguf_cursor import HEADER_LIMIT_BYTES

FIRST_BYTES = 1 << 20
TIMEOUT_SECONDS = 30
PIECE_BYTES = 1 << 20
MOST_TRIES, RETRY_SECONDS = 5, 1.0
"""In a row that brought nothing, each twice as long after the one before."""
_SHARD = re.compile(r"-00001-of-(\d{5})\.gguf")


def is_address(text: str) -> bool:
    """Whether it is fetched, not opened."""
    return text.startswith(("http://", "https://"))


class Remote:
    """A file behind an address, of which parts are asked for.

    Parameters
    ----------
    url : str
    token : str or None
        Goes to the first host alone, not to where that redirects.

    Attributes
    ----------
    size : int
        Of the file, once a part was asked for.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url, self._token = url, token
        self.size = 0

    @contextmanager
    def part(self, start: int, end: int | None = None) -> Iterator[http.client.HTTPResponse]:
        """A stream of bytes [start, end), fewer where the file ends.

        Raises
        ------
        UsageError
            There is no such file, or no parts of it.
        OSError, http.client.HTTPException
            The connection failed.
        """
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={start}-{'' if end is None else end - 1}"})
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                total = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range") or "")
                if response.status != 206 or total is None:
                    raise UsageError(f"{self.url} gives no parts of files", hint="download the GGUF, and give its name")
                self.size = int(total[1])
                yield response
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                raise OSError(errno.EIO, f"the server answers {error.code}") from None
            fix = {401: "-hft TOKEN", 403: "-hft TOKEN", 404: "look at the address"}.get(error.code)
            raise UsageError(f"{self.url} answers {error.code}", hint=fix) from None

    def read(self, start: int, end: int) -> bytes:
        """All of that part.

        Raises
        ------
        UsageError
        """
        try:
            with self.part(start, end) as response:
                return response.read(end - start)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UsageError(f"{self.url} can't be reached: {reason}", hint="look at the address") from None


def download(remote: Remote, path: Path, size: int, label: str) -> None:
    """Have the whole file, going on where an earlier call was cut short; a cut connection is tried again.

    Parameters
    ----------
    remote : Remote
    path : Path
        Under another name until it is whole.
    size : int
        That it must have.
    label : str
        What the bar is called.

    Raises
    ------
    UsageError
        The file is gone or another one, somebody else is downloading it, or the connection does not come back.
    """
    partial = path.with_name(f"{path.name}.fomoe.incomplete")
    with partial.open("ab") as stream, Progress(label, size, done=min(stream.tell(), size)) as progress:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{label} is being downloaded by another process", hint="wait until it is done") from None
        if stream.tell() > size:
            stream.truncate(0)
        tries = 0
        while stream.tell() < size:
            before = stream.tell()
            try:
                with remote.part(before) as response:
                    if remote.size != size:
                        raise UsageError(f"{remote.url} has {remote.size:,} bytes, {size:,} were announced")
                    while piece := response.read(PIECE_BYTES):
                        stream.write(piece)
                        progress.add(len(piece))
            except (OSError, http.client.HTTPException) as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise  # of the drive, not of the network
                reason = getattr(error, "reason", error)
            else:
                reason = "the connection was cut"
            stream.flush()
            tries = 0 if stream.tell() > before else tries + 1
            if tries > MOST_TRIES:
                raise UsageError(f"{label}: {reason}", hint="the same command goes on where it stopped")
            if stream.tell() < size:
                time.sleep(min(2**tries, 30) * RETRY_SECONDS)
        os.fsync(stream.fileno())
        partial.replace(path)


def fetch_headers(url: str, folder: Path, token: str | None = None) -> tuple[Path, int]:
    """Headers of a model, of all its shards, as sparse files of the sizes that the files have.

    Parameters
    ----------
    url : str
        Of a GGUF, or its first shard.
    folder : Path
        Where to put them.
    token : str, optional

    Returns
    -------
    tuple
        The (first) file, and the bytes that were fetched.

    Raises
    ------
    FormatError, UsageError
        It is no GGUF, or can't be had.
    """
    first, fetched = _fetch_header(url, folder, token)
    address = urlsplit(url)
    match = _SHARD.search(address.path)
    if match is not None:
        for number in range(2, int(match[1]) + 1):
            path = address.path.replace(match[0], f"-{number:05d}-of-{match[1]}.gguf")
            fetched += _fetch_header(address._replace(path=path).geturl(), folder, token)[1]
    GGUFFile.open(first)
    return first, fetched


def _fetch_header(url: str, folder: Path, token: str | None) -> tuple[Path, int]:
    """One file: more and more of it, until its header is whole."""
    remote = Remote(url, token)
    path = folder / (unquote(urlsplit(url).path).rpartition("/")[2] or "model.gguf")
    have, want = 0, FIRST_BYTES
    with path.open("wb") as stream:
        while True:
            piece = remote.read(have, want)
            stream.seek(have)
            stream.write(piece)
            stream.truncate(remote.size)
            stream.flush()
            have += len(piece)
            if _is_whole(path, have):
                return path, have
            if not piece or have >= min(remote.size, HEADER_LIMIT_BYTES):
                read_metadata(path)  # says what is wrong with it
                raise FormatError(f"{url}: the header is cut")
            want = min(2 * want, remote.size, HEADER_LIMIT_BYTES)


def _is_whole(path: Path, have: int) -> bool:
    """Whether the header was read from bytes that are there: what follows is zero."""
    from fomoe_io.storage.gguf import _read_shard

    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            return have >= 4 and _complain(path)
    try:
        return _read_shard(path, 0).header_bytes <= have
    except FormatError:
        return False


def _complain(path: Path) -> bool:
    read_metadata(path)
    return True
