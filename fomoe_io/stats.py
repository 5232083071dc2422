"""The banner before, and the line of statistics after a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fomoe_io.errors import printable
from fomoe_io.system.files import write_atomically
from fomoe_io.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from fomoe_io.engine import Engine


def format_banner(engine: Engine) -> list[str]:
    """What runs, how exact, and where its memory goes: lines for stderr."""
    s, reader = engine.shape, engine.reader
    how = f"{reader.name}{' O_DIRECT' if reader.direct else ', page cache'}"
    lines = [
        f"{engine.model_name}  {_exactness(engine)}",
        f"{s.layers} layers x {s.experts} experts, top-{s.used}; {engine.store.kind} store; {how}; "
        f"{engine.backend.computed_by}",
        *engine.memory_lines(),
    ]
    lines[-1] += f"; loaded in {format_seconds(engine.load_seconds)}"
    if engine.profile is not None:
        lines.append(f"warm start from a profile of {engine.profile.tokens:,} tokens")
    lines += [f"note: {note}" for note in engine.tokenizer.notes]
    lines += [f"note: {problem}; reading the other copy" for problem in engine.store.lost_copies]
    lines += [f"note: {note}" for note in reader.notes]
    return [printable(line) for line in lines]


def _exactness(engine: Engine) -> str:
    if engine.config.car is None:
        return "exact (weights unmodified, no expert substitution)"
    return f"not exact: resident experts may stand in for missing ones (--car {engine.config.car})"


def format_footer(statistics: Mapping[str, Any]) -> str:
    """One line: speeds, where the experts were found, what was read."""
    s = statistics
    requests = max(s["expert_requests"], 1)
    share = {tier: 100 * values["hits"] / requests for tier, values in s["tiers"].items()}
    tiers = " ".join(
        f"{name.upper()} {share[name]:.0f} %" for name in ("vram", "dram", "nvme") if name != "vram" or share[name]
    )
    exact = "" if s["exact"] else f"not exact: {100 * s['substitutions'] / requests:.1f} % substituted   "
    stall = s["stall_seconds"]["nvme"] / max(s["prompt_seconds"] + s["decode_seconds"], 1e-9)
    # the last token of an answer is chosen, and never read
    generated = s.get("answered_tokens", s["generated_tokens"])
    seed = "" if s.get("seed") is None else f"   seed {s['seed']}"
    return (
        f"prompt {s['prompt_tokens']} tok {s['prompt_tokens_per_second']:.1f} tok/s   "
        f"gen {generated} tok {s['tokens_per_second']:.1f} tok/s   experts {tiers}   {exact}"
        f"read {format_bytes(s['nvme_bytes_per_token'])}/tok   stall {100 * stall:.0f} %   "
        f"peak RAM {format_bytes(s['peak_rss_bytes'])}{seed}"
    )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write statistics whole or not at all."""
    write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())
