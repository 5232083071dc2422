"""Prompts on a GPU: tokens a second by the width of a batch, beside the time that the drive needs for what was read.

    python bench/device_prompt.py MODEL [--tokens 512] [--batches 64,512] [--tiers vram=10%,dram=7%]

Prints one JSON object.  Every width is run twice on one engine of its own; the second run counts.  `over_drive` is the
prompt's time over its NVMe bytes at the rate that the engine's own reader has for the same records in the same run;
`decode_tokens_per_second` is what reading the same tokens one by one gives.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from any_commit import drive_rate
from box import kernel_tuning, report
from device_decode import decode, gpu_of

from fomoe_io import Engine, EngineConfig
from fomoe_io.config import Tiers, Tuning
from fomoe_io.storage.pace import Pace


def prefill(engine: Engine, tokens: np.ndarray) -> tuple[float, dict[str, Any]]:
    """Seconds and statistics of one prompt."""
    engine.reset_statistics()
    session = engine.session()
    started = time.perf_counter()
    session.prefill(tokens)
    seconds = time.perf_counter() - started
    session.close()
    return seconds, engine.statistics()


def measure(engine: Engine, tokens: np.ndarray, *, decodes: int) -> dict[str, Any]:
    """One width of a batch."""
    prefill(engine, tokens)
    drive = drive_rate(engine, engine.config.pace)
    seconds, s = prefill(engine, tokens)
    nvme, prefetch = s["tiers"]["nvme"], s["prefetch"]
    needed = nvme["bytes"] - prefetch["wasted_bytes"]
    result = {
        "batch_tokens": engine.budgets.batch_tokens, "seconds": seconds, "tokens_per_second": len(tokens) / seconds,
        "experts_read": nvme["reads"], "nvme_bytes": nvme["bytes"], "drive_gb_s": drive / 1e9,
        "over_drive": seconds / (needed / drive) if needed else None, "prefetch": prefetch,
        "uses_vendor_library": gpu_of(engine).uses_products(len(tokens)), "device_calls": s["device_calls"],
    }  # fmt: skip
    if decodes:
        decode(engine, tokens[:decodes], 0)
        times, _ = decode(engine, tokens[:decodes], 0)
        result["decode_tokens_per_second"] = len(times) / sum(times)
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sm", choices=("layer", "pingpong", "tensor"), default="layer")
    parser.add_argument("--reader", default="auto", help="pread overlaps on tmpfs, io_uring does not")
    parser.add_argument("--pace", type=Pace.parse, help="of a drive that is not at hand, such as 14.5G,80us")
    parser.add_argument("--lookahead", choices=("off", "on", "auto"), default="off")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batches", default="64,512")
    parser.add_argument("--tiers", type=Tiers.parse)
    parser.add_argument("--decodes", type=int, default=32, help="tokens read one by one for comparison, 0: none")
    parser.add_argument("--without-library", action="store_true", help="our own kernels for dense products, too")
    parser.add_argument("--kernel", type=kernel_tuning, action="append", default=[], metavar="NAME=VALUE",
                        help="of gpu/kernels/tuning.h, such as BYTE_MATRICES=0")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    tokens, runs = None, []
    for batch in map(int, options.batches.split(",")):
        config = EngineConfig(
            device=options.device,
            split_mode=options.sm,
            reader=options.reader,
            pace=options.pace,
            tiers=options.tiers,
            batch_tokens=batch,
            context_tokens=4096,
            lookahead=options.lookahead,
            tuning=Tuning(library_products=not options.without_library, kernel_tuning=tuple(options.kernel)),
        )
        with Engine.open(options.model, config) as engine:
            if tokens is None:
                tokens = np.random.default_rng(1).integers(0, engine.shape.vocabulary, options.tokens)
            runs.append(measure(engine, tokens, decodes=options.decodes))
            gpu = gpu_of(engine).gpu
            head = {"device": str(gpu), "driver": gpu.driver(), "model": engine.model_name}
            slots = {"vram": int(engine.budgets.slots[0][0]), "dram": int(engine.budgets.slots[0][1])}
    result = head | {"slots": slots, "tokens": options.tokens, "runs": runs}
    report(result, options.output)


if __name__ == "__main__":
    main()
