"""/metrics: Prometheus' text, under llama-server's names where it has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fomoe_io.serve.jobs import JobQueue
from fomoe_io.serve.worker import EngineWorker

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[str, str, str, list[tuple[str, float]]]
"""Name, kind, help, and values with their labels."""


def render(worker: EngineWorker, queue: JobQueue) -> str:
    """All metrics."""
    samples = [*_llama(worker, queue), *_requests(worker, queue), *_experts(worker.statistics)]
    lines = []
    for name, kind, text, values in samples:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {_number(value)}" for labels, value in values]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _one(name: str, kind: str, text: str, value: float) -> Sample:
    return name, kind, text, [("", value)]


def _llama(worker: EngineWorker, queue: JobQueue) -> list[Sample]:
    s = worker.statistics
    return [
        _one("llamacpp:prompt_tokens_total", "counter", "Prompt tokens read.", s["prompt_tokens"]),
        _one("llamacpp:prompt_seconds_total", "counter", "Seconds of reading prompts.", s["prompt_seconds"]),
        _one("llamacpp:tokens_predicted_total", "counter", "Tokens generated.", s["generated_tokens"]),
        _one("llamacpp:tokens_predicted_seconds_total", "counter", "Seconds of generating.", s["decode_seconds"]),
        _one("llamacpp:n_decode_total", "counter", "Calls of the engine for a token.", s["generated_tokens"]),
        _one("llamacpp:n_tokens_max", "gauge", "Most tokens a request has had.", worker.most_tokens),
        _one("llamacpp:prompt_tokens_seconds", "gauge", "Prompt tokens a second.", s["prompt_tokens_per_second"]),
        _one("llamacpp:predicted_tokens_seconds", "gauge", "Tokens generated a second.", s["tokens_per_second"]),
        _one("llamacpp:requests_processing", "gauge", "Requests at work.", queue.at_work),
        _one("llamacpp:requests_deferred", "gauge", "Requests that wait.", len(queue)),
    ]


def _requests(worker: EngineWorker, queue: JobQueue) -> list[Sample]:
    outcomes = worker.outcomes
    counts = {
        "finished": outcomes["finished"],
        "cancelled": outcomes["cancelled"] + queue.left,
        "failed": outcomes["failed"],
        "refused": queue.refused,
    }
    values = [(f'{{outcome="{name}"}}', float(count)) for name, count in counts.items()]
    return [
        ("fomoe_requests_total", "counter", "Requests by how they ended.", values),
        _one("fomoe_kept_session_bytes", "gauge", "Memory of sessions beside the open one.", worker.kept_bytes),
        _one("fomoe_prompt_tokens_cached_total", "counter", "Prompt tokens not read again.", worker.cached_tokens),
    ]


def _experts(s: Mapping[str, Any]) -> list[Sample]:
    tiers = [(f'{{tier="{name}"}}', float(values["hits"])) for name, values in s["tiers"].items()]
    nvme = s["tiers"]["nvme"]
    return [
        _one("fomoe_expert_requests_total", "counter", "Experts that the router asked for.", s["expert_requests"]),
        ("fomoe_expert_hits_total", "counter", "Where they were found.", tiers),
        _one("fomoe_nvme_reads_total", "counter", "Reads from the drive.", nvme["reads"]),
        _one("fomoe_nvme_read_bytes_total", "counter", "Bytes of them.", nvme["bytes"]),
        _one("fomoe_nvme_stall_seconds_total", "counter", "Seconds of waiting for them.", s["stall_seconds"]["nvme"]),
        _one("fomoe_expert_evictions_total", "counter", "Experts that left memory.", s["evictions"]),
        _one("fomoe_expert_substitutions_total", "counter", "Picks that others stood in for.", s["substitutions"]),
        _one("fomoe_exact", "gauge", "1 when no expert stands in for another.", float(s["exact"])),
        _one("fomoe_peak_rss_bytes", "gauge", "Peak resident memory.", s["peak_rss_bytes"]),
        _one("fomoe_load_seconds", "gauge", "Seconds of opening the model.", s["load_seconds"]),
    ]  # fmt: skip
