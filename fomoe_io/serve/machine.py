"""/machine: what the machine does, for the page: where experts are, what the drive gives, and what it costs."""

from __future__ import annotations

import time
from typing import Any

from fomoe_io.serve.jobs import JobQueue
from fomoe_io.serve.worker import EngineWorker

WATCH_SECONDS = 5.0
"""After a look, the map of the experts is kept up to date for so long."""


def document(worker: EngineWorker, queue: JobQueue) -> dict[str, Any]:
    """Counters since the start, of which a watcher takes differences; nothing here waits for the engine."""
    worker.watched_until = time.monotonic() + WATCH_SECONDS
    s, slot, experts = worker.statistics, worker.slot, worker.experts
    nvme = s["tiers"]["nvme"]
    return {
        "model": s["model"],
        "device": s["device"],
        "exact": s["exact"],
        "car": s["car"],
        "lookahead": s["prefetch"]["is_on"],
        "seconds": time.monotonic(),
        "prompt_tokens": s["prompt_tokens"],
        "prompt_seconds": s["prompt_seconds"],
        "generated_tokens": s["generated_tokens"],
        "decode_seconds": s["decode_seconds"],
        "cached_tokens": worker.cached_tokens,
        "expert_requests": s["expert_requests"],
        "hits": {tier: values["hits"] for tier, values in s["tiers"].items()},
        "nvme_reads": nvme["reads"],
        "nvme_bytes": nvme["bytes"],
        "stall_seconds": s["stall_seconds"]["nvme"],
        "substitutions": s["substitutions"],
        "evictions": s["evictions"],
        "peak_rss_bytes": s["peak_rss_bytes"],
        "at_work": queue.at_work,
        "waiting": len(queue),
        "prompt": {"total": slot.prompt_tokens, "processed": slot.processed_tokens} if slot.is_processing else None,
        "layers": [] if experts is None else experts.document(),
    }
