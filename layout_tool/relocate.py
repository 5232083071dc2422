"""`fomoe-layout relocate`: tell a striped store where its other directories are now.  Moves no data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fomoe_io.cli.common import note
from fomoe_io.errors import StoreError, UsageError
from fomoe_io.storage.manifest import MANIFEST, Fields, seal, unseal
from fomoe_io.storage.store import Store, manifest_path
from fomoe_io.system.files import write_atomically
from layout_tool import targets as target_tools
from layout_tool.direct import write_error


def relocate(directory: Path, others: Sequence[Path]) -> int:
    """Rewrite the paths of a store's other directories, once all its files are found there.

    Parameters
    ----------
    directory : Path
        Where the manifest is.
    others : sequence of Path
        The other directories, in the order of the pack.

    Raises
    ------
    StoreError
        When a file is missing there, or is of another store; the manifest is left as it was.
    """
    path = manifest_path(directory)
    found = unseal(path)
    if found.text("kind") != "packed":
        raise StoreError(
            f"{directory} points into a GGUF", hint=f"fomoe-layout index MODEL.gguf --to {directory} --overwrite"
        )
    count = len(found.texts("targets")) - 1
    if len(others) != count:
        raise UsageError(
            f"{directory} has {count} other directories, {len(others)} were given",
            hint="one --to DIR for each, in the order of the pack, without the first",
        )
    body = json.loads(path.read_bytes())
    del body["xxh3_64"]
    body["targets"] = [str(target) for target in target_tools.resolve([directory, *others])]
    Store.of_manifest(directory, Fields(body, str(path)))
    try:
        write_atomically(directory / MANIFEST, seal(body))
    except OSError as error:
        raise write_error(error, path) from error
    note(f"relocate  {directory} with {', '.join(body['targets'][1:])}")
    return 0
