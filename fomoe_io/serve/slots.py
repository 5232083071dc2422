"""/slots/N?action=save|restore|erase: the session in a file, as llama-server has it."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from fomoe_io.errors import FomoeError
from fomoe_io.kept.timeline import Timeline
from fomoe_io.serve.errors import ApiError, bad_request, not_supported
from fomoe_io.serve.jobs import Job, JobQueue, Over, SlotWork, Told
from fomoe_io.serve.schema import read
from fomoe_io.serve.settings import ServeConfig

MOST_NAME_BYTES = 200


class SlotRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body."""

    filename: str = ""


def slot_work(slot: str, action: str, body: bytes, config: ServeConfig) -> SlotWork:
    """What is asked for.

    Raises
    ------
    ApiError
        No such slot or action, a name that is none, or no folder for files.
    """
    folder = config.slot_folder
    if folder is None:
        raise not_supported("saving and restoring slots: start it with --slot-save-path DIR")
    if slot not in map(str, range(config.parallel)):
        there = "0 is the one" if config.parallel == 1 else f"there are 0 to {config.parallel - 1}"
        raise bad_request(f"there is no slot {slot[:20]}: {there}")
    if action not in ("save", "restore", "erase"):
        raise bad_request(f"action {action[:20]!r} is not save, restore or erase")
    name = "" if action == "erase" else read(body or b"{}", SlotRequest).filename
    if action != "erase" and not _is_name(name):
        raise bad_request("filename names no file of --slot-save-path", param="filename")
    return SlotWork(action, folder / name, int(slot))  # type: ignore[arg-type]


def _is_name(name: str) -> bool:
    is_plain = name.isprintable() and "/" not in name and "\\" not in name
    return is_plain and not name.startswith(".") and 0 < len(name.encode("utf-8", "replace")) <= MOST_NAME_BYTES


def act(timeline: Timeline, work: SlotWork) -> dict[str, Any]:
    """Do it, on the engine's thread; what the client is told.

    Raises
    ------
    ApiError
        There is nothing to save, or the file can't be written or used.
    """
    started, name = time.monotonic(), work.path.name
    try:
        if work.action == "erase":
            count = len(timeline.tokens)
            timeline.erase()
            return {"id_slot": work.slot, "n_erased": count}
        count, size = timeline.save(work.path) if work.action == "save" else timeline.load(work.path)
    except FomoeError as error:
        raise bad_request(error.message) from None
    except FileNotFoundError:
        raise bad_request(f"there is no saved slot {name}", param="filename") from None
    except OSError as error:
        raise ApiError(500, "server_error", f"{work.action} of {name} failed: {error.strerror}") from None
    milliseconds = 1e3 * (time.monotonic() - started)
    if work.action == "save":
        figures = {"n_saved": count, "n_written": size, "timings": {"save_ms": milliseconds}}
    else:
        figures = {"n_restored": count, "n_read": size, "timings": {"restore_ms": milliseconds}}
    return {"id_slot": work.slot, "filename": name, **figures}


async def told(work: SlotWork, queue: JobQueue) -> dict[str, Any]:
    """Wait in the queue for it.

    Raises
    ------
    ApiError
    """
    job, document = Job(work), {}
    queue.put(job)
    try:
        while True:
            for event in await job.events():
                if isinstance(event, Told):
                    document = event.document
                elif isinstance(event, Over):
                    if event.error is not None:
                        raise event.error
                    return document
    finally:
        queue.cancel(job)
