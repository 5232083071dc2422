"""The options that commands share: the model, its memory and reading, and how tokens are chosen."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from fomoe_io.cli.common import note
from fomoe_io.cli.parser import Parser, checked, number, whole
from fomoe_io.config import EngineConfig, Tiers, device_name, lookahead_of
from fomoe_io.errors import BudgetError, UsageError
from fomoe_io.experts.car import CarRule
from fomoe_io.storage.pace import Pace
from fomoe_io.system.memory import available_bytes
from fomoe_io.text.sampler import SamplingConfig
from fomoe_io.trace.trace import check_trace_target
from fomoe_io.units import format_bytes, parse_bytes

MODEL_VARIABLE = "FOMOE_MODEL"
LEAST_SIZE_BYTES = 1 << 20
"""A smaller bound of memory is a number whose unit was forgotten."""

OPTION_OF = {
    "temperature": "--temp", "top_k": "--top-k", "top_p": "--top-p", "min_p": "--min-p",
    "repeat_penalty": "--repeat-penalty", "repeat_last": "--repeat-last-n", "presence_penalty": "--presence-penalty",
    "frequency_penalty": "--frequency-penalty", "threads": "-t", "context_tokens": "-c", "batch_tokens": "-b",
    "slots": "--slots", "lookahead": "--lookahead", "ram_bytes": "--ram", "vram_bytes": "--vram",
    "queue_requests": "--queue", "piece_tokens": "-ub", "body_bytes": "--max-body", "stall_seconds": "--timeout",
    "port": "--port",
}  # fmt: skip
"""What a user calls a field of a configuration."""


@contextmanager
def as_options() -> Iterator[None]:
    """A configuration's complaint about a field names the option instead."""
    try:
        yield
    except UsageError as error:
        field, found, rest = error.message.partition(" is ")
        if not found or field not in OPTION_OF:
            raise
        raise UsageError(f"{OPTION_OF[field]} is {rest}", hint=error.hint) from None


# ---- the model ----


def add_model(parser: Parser) -> None:
    """The model argument."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "model", nargs="?", help=f"store directory or GGUF file (default: ${MODEL_VARIABLE})", metavar="MODEL"
    )
    group.add_argument("-m", "--model", dest="model_option", metavar="MODEL", help="the same, as an option")
    group.add_argument("-hf", "-hfr", "--hf-repo", metavar="USER/MODEL[:QUANT]",
        help="download it from the Hugging Face hub first, or go on with that (default quant: Q4_K_M)")  # fmt: skip
    group.add_argument("-hff", "--hf-file", metavar="FILE", help="with -hf: this file of it, or its first shard")
    group.add_argument("-hft", "--hf-token", metavar="TOKEN", help="for the hub (default: $HF_TOKEN)")
    group.add_argument("--offline", action="store_true", help="with -hf: only what was downloaded before")


def model_path(options: argparse.Namespace) -> Path:
    """The model that was named.

    Raises
    ------
    UsageError
        None was, or two.
    """
    named = [name for name in (options.model, options.model_option, options.hf_repo) if name]
    if len(named) > 1:
        raise UsageError(f"two models were named: {named[0]} and {named[1]}")
    if options.hf_repo:
        from fomoe_io.cli.hub import fetched

        return fetched(options.hf_repo, options.hf_file, options.hf_token, offline=options.offline)
    name = named[0] if named else os.environ.get(MODEL_VARIABLE)
    if not name:
        raise UsageError("no model was named", hint=f"a store or GGUF as the argument, or {MODEL_VARIABLE}=PATH")
    return Path(name)


# ---- memory, placement, reading ----


def _memory_size(text: str) -> int:
    """Of --ram and --vram: 16 is no size of a memory."""
    size = parse_bytes(text)
    if size < LEAST_SIZE_BYTES and re.fullmatch(r"\d+(\.\d+)?", text.strip()):
        raise UsageError(f"{text} bytes are no memory", hint=f"{text}G")
    return size


def _device(text: str) -> str:
    """Also llama.cpp's names: none, CUDA0, ROCm1."""
    lower = text.lower()
    if lower == "none":
        return "cpu"
    match = re.fullmatch(r"(cuda|rocm|hip)(\d+)", lower)
    return device_name(f"{'hip' if match[1] == 'rocm' else match[1]}:{match[2]}" if match else lower)


class _ListDevices(argparse.Action):
    """Print the devices and end."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        from fomoe_io.errors import DeviceError
        from fomoe_io.gpu.device import all_devices

        try:
            for found in all_devices():
                memory = format_bytes(found.memory_bytes)
                print(f"{found.option}: {found.name} ({found.architecture}, {memory}) by {found.provider}")
        except DeviceError:
            print("cpu: no GPU was found (fomoe-doctor says why)")
        sys.exit(0)


def add_engine_options(parser: Parser) -> None:
    """Options of :class:`EngineConfig`."""
    d = EngineConfig()
    group = parser.add_argument_group("memory and machine (sizes: 512M, 16G)")
    group.add_argument("--ram", type=checked(_memory_size), metavar="SIZE",
        help="bound of the whole process (default: 80 %% of what is available)")  # fmt: skip
    group.add_argument("--vram", type=checked(_device_sizes), metavar="SIZE",
        help="bound of device memory, or one a device: 12G,16G (default: what is free)")  # fmt: skip
    group.add_argument("-dev", "--device", type=checked(_device), default="auto", metavar="NAME",
        help="auto (GPUs if there are any, equal ones all), cpu, hip, cuda, or by number: hip:1, cuda:0,1")  # fmt: skip
    group.add_argument("-sm", "--split-mode", type=checked(_split_mode), default="auto", metavar="MODE",
        help="several devices: layer (each computes a run of layers), tensor (all compute every layer, of each product "
        "some rows), pingpong (layers in turn), none (the first alone), or auto (tensor where equal devices win by it, "
        "else layer)")  # fmt: skip
    group.add_argument("--peer-memory", action="store_true",
        help="-sm tensor of two devices: exchange by each other's memory, if a test finds that whole")  # fmt: skip
    group.add_argument("-ts", "--tensor-split", type=checked(_tensor_split), metavar="N,N",
        help="how much of the model each device takes (default: all the same)")  # fmt: skip
    group.add_argument("--list-devices", action=_ListDevices, nargs=0, help="list the devices and exit")
    group.add_argument("-t", "--threads", type=whole, metavar="N",
        help="-1 and default: all processors of this process")  # fmt: skip
    group.add_argument("-c", "--ctx-size", type=whole, metavar="N",
        help="context, in tokens; 0: all that the model was trained on (default: that, at most 4096)")  # fmt: skip
    for name, what in (("k", "keys"), ("v", "values")):
        group.add_argument(f"-ct{name}", f"--cache-type-{name}", type=checked(_kv_type), metavar="TYPE",
            help=f"what the context's {what} are kept as: f32 (default), or f16, which takes half the memory and "
            "rounds; both in one type")  # fmt: skip
    group.add_argument("-b", "--batch-size", type=whole, metavar="N",
        help="prompt tokens at once (default: 512; on a GPU 2048 where they take little of its memory)")  # fmt: skip
    group = parser.add_argument_group("experts (none but --car changes an answer)")
    group.add_argument("--slots", type=whole, metavar="N",
        help="experts of each layer in memory (default: all that --ram has room for)")  # fmt: skip
    group.add_argument("--policy", choices=("decayed", "lru", "lfu", "lfru"), default=d.policy,
        help="who leaves memory first")  # fmt: skip
    group.add_argument("--lookahead", type=checked(lookahead_of), default=d.lookahead, metavar="on|off|auto|N",
        help="read experts of the next layer ahead, by its router's guess: as many as it picks or up to N, or where "
        "that is measured to pay (auto, the default)")  # fmt: skip
    group.add_argument("--car", type=checked(CarRule.parse), metavar="RULE",
        help="let resident experts stand in for missing ones, which is not exact: "
        "off (default), on, ratio:TAU, prior:LAMBDA, regret:RHO or budget:RHO")  # fmt: skip
    group.add_argument("--tiers", type=checked(Tiers.parse), metavar="SPEC",
        help="most experts in VRAM and DRAM (simulated on a CPU), such as vram=20%%,dram=15%%")  # fmt: skip
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="write the routing of every token, for fomoe-bench cache"
    )
    group = parser.add_argument_group("reading and kernels")
    group.add_argument("--reader", choices=("auto", "uring", "pread"), default=d.reader, help="how the drive is read")
    group.add_argument("--calibration", metavar="FILE", help="how to read: from fomoe-bench io --calibrate FILE")
    group.add_argument("--pace", type=checked(Pace.parse), metavar="RATE,LATENCY",
        help="read no faster than such a drive, for measurements: 14.5G,80us")  # fmt: skip
    group.add_argument("--kernels", choices=("auto", "ggml", "portable"), default=d.kernels, help="what multiplies")


def _cache_size(text: str) -> int:
    """Of --cache-ram: a bare number is MiB, as llama-server has it."""
    size = parse_bytes(text)
    return size << 20 if re.fullmatch(r"\d+", text.strip()) else size


def add_cache_options(parser: Parser) -> None:
    """What commands that answer keep of what they have read."""
    group = parser.add_argument_group("prompts that were read before (none changes an answer)")
    group.add_argument("-cram", "--cache-ram", type=checked(_cache_size), metavar="SIZE",
        help="memory for them, of --ram (default: a sixteenth of it, at most 2G; 0: none)")  # fmt: skip
    group.add_argument("--cache-disk", type=checked(parse_bytes), default=0, metavar="SIZE",
        help="files that keep them beyond this run, such as 50G (default: none)")  # fmt: skip
    group.add_argument("--cache-dir", type=Path, metavar="DIR",
        help="where those are (default: sessions, in the cache directory)")  # fmt: skip


def engine_config(options: argparse.Namespace, path: Path | None = None) -> EngineConfig:
    """The configuration that the options ask for; the model's path is needed for `-c 0`.

    Raises
    ------
    UsageError, OSError
        They do not go together, or no trace can be written where it should go.
    """
    if options.trace is not None:
        check_trace_target(options.trace)
    with as_options():
        return EngineConfig(
            ram_bytes=options.ram,
            slots=options.slots,
            threads=None if options.threads is None or options.threads <= 0 else options.threads,
            cache_bytes=getattr(options, "cache_ram", 0),
            cache_disk_bytes=getattr(options, "cache_disk", 0),
            cache_folder=getattr(options, "cache_dir", None),
            context_tokens=trained_tokens(path) if options.ctx_size == 0 and path is not None else options.ctx_size,
            batch_tokens=options.batch_size,
            kv_type=_one_kv_type(options.cache_type_k, options.cache_type_v),
            reader=options.reader,
            calibration=options.calibration,
            pace=options.pace,
            kernels=options.kernels,
            policy=options.policy,
            tiers=options.tiers,
            lookahead=options.lookahead,
            car=options.car,
            trace=options.trace,
            device=options.device.split(",")[0] if options.split_mode == "none" else options.device,
            vram_bytes=options.vram,
            split_mode=options.split_mode,
            peer_memory=options.peer_memory,
            tensor_split=options.tensor_split,
        )


def _split_mode(text: str) -> str:
    if text not in ("auto", "none", "layer", "pingpong", "tensor", "row"):
        raise UsageError(f"unknown split {text!r}", hint="-sm auto, layer, tensor, pingpong or none")
    return "tensor" if text == "row" else text


def _tensor_split(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.replace("/", ",").split(",")))
    except ValueError:
        raise UsageError(f"{text!r} is no list of numbers", hint="-ts 3,1") from None


def _device_sizes(text: str) -> int | tuple[int, ...]:
    sizes = tuple(map(_memory_size, text.split(",")))
    return sizes if len(sizes) > 1 else sizes[0]


def _kv_type(text: str) -> str:
    if text not in ("f32", "f16"):
        raise UsageError(f"keys and values are kept as f32 or f16, not as {text}", hint="-ctk f16 -ctv f16")
    return text


def _one_kv_type(keys: str | None, values: str | None) -> str:
    keys, values = keys or "f32", values or "f32"
    if keys != values:
        raise UsageError(f"keys as {keys} and values as {values}: both are kept in one type", hint="-ctk f16 -ctv f16")
    return keys


def trained_tokens(path: Path) -> int | None:
    """The context that a model was trained on, from its metadata."""
    from fomoe_io.storage.metadata import Metadata
    from fomoe_io.storage.store import Store

    metadata = Metadata(Store.open(path).metadata)
    return metadata.integer(f"{metadata.text('general.architecture', '')}.context_length", None)


def note_memory(options: argparse.Namespace) -> None:
    """Say it when --ram promises more than there is."""
    available = available_bytes()
    if options.ram is not None and options.ram > 1.1 * available:
        note(f"note: --ram is {format_bytes(options.ram)}, and {format_bytes(available)} are available")


@contextmanager
def smaller_context_helps(options: argparse.Namespace) -> Iterator[None]:
    """A budget that a large context uses up is told so."""
    try:
        yield
    except BudgetError as error:
        if options.ctx_size is None or 0 < options.ctx_size <= 4096:
            raise
        raise BudgetError(error.message, hint=f"{error.hint}, or a smaller -c: its memory grows with it") from None


# ---- sampling ----

_SAMPLING: list[tuple[tuple[str, ...], str, str]] = [
    (("--temp", "--temperature"), "temperature", "0 is greedy"),
    (("--top-k",), "top_k", "the likeliest N; 0: all"),
    (("--top-p",), "top_p", "the likeliest that sum up to this share; 1: all"),
    (("--min-p",), "min_p", "at least this share of the likeliest one's probability; 0: all"),
    (("--repeat-penalty",), "repeat_penalty", "divides logits of recent tokens; 1: none"),
    (("--presence-penalty",), "presence_penalty", "taken off the logits of recent tokens, once"),
    (("--frequency-penalty",), "frequency_penalty", "taken off for each time that they came"),
    (("--repeat-last-n",), "repeat_last", "how many tokens are recent; -1: the whole context"),
]


def add_sampling_options(parser: Parser, title: str = "sampling (defaults: the model's own, else llama.cpp's)") -> None:
    """Options of :class:`SamplingConfig`; None where the user says nothing."""
    d = SamplingConfig()
    group = parser.add_argument_group(title)
    group.add_argument("-s", "--seed", type=whole, metavar="N", help="-1 and default: a random one, which is shown")
    for names, field, about in _SAMPLING:
        default = getattr(d, field)
        group.add_argument(*names, type=whole if isinstance(default, int) else number, dest=field, metavar="N",
            help=f"{about} (default: {default:g})")  # fmt: skip


def chosen_sampling(options: argparse.Namespace) -> dict[str, Any]:
    """What the user chose, by the fields of :class:`SamplingConfig`."""
    chosen = {field: getattr(options, field) for _, field, _ in _SAMPLING if getattr(options, field) is not None}
    if "top_k" in chosen:
        chosen["top_k"] = max(chosen["top_k"], 0)
    if options.seed is not None and options.seed >= 0:
        chosen["seed"] = options.seed
    return chosen


def sampling_config(options: argparse.Namespace, metadata: Mapping[str, Any] | None = None) -> SamplingConfig:
    """What the user chose, else what the model asks for, else llama.cpp's defaults.

    Raises
    ------
    UsageError
    """
    with as_options():
        return SamplingConfig.of_model(metadata or {}, **chosen_sampling(options))


# ---- thinking and chat templates ----


def add_reasoning_options(group: Any) -> None:
    """--reasoning and --reasoning-budget."""
    group.add_argument("-rea", "--reasoning", nargs="?", choices=("on", "off", "auto"), const="on", default="auto",
        metavar="on|off|auto", help="let the model think; auto: as its template does")  # fmt: skip
    group.add_argument("--reasoning-budget", type=whole, choices=(-1, 0), default=-1, metavar="-1|0",
        help="0: no thoughts, as --reasoning off")  # fmt: skip


def thinking(options: argparse.Namespace) -> bool | None:
    """What a template is told of `enable_thinking`; None: nothing."""
    if options.reasoning_budget == 0:
        return False
    return {"on": True, "off": False}.get(options.reasoning)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def add_template_options(group: Any) -> None:
    """--chat-template and --chat-template-file."""
    group.add_argument("--chat-template", metavar="JINJA", help="instead of the model's; chatml is built in")
    group.add_argument("--chat-template-file", type=Path, metavar="FILE", help="the same, from a file")


def chat_template(options: argparse.Namespace) -> str | None:
    """The template that was given.

    Raises
    ------
    UsageError, OSError
    """
    if options.chat_template is not None and options.chat_template_file is not None:
        raise UsageError("a chat template was given both by --chat-template and by --chat-template-file")
    if options.chat_template_file is not None:
        return str(options.chat_template_file.read_text(encoding="utf-8"))
    if options.chat_template is None or "{" in options.chat_template:
        return str(options.chat_template) if options.chat_template else None
    if options.chat_template != "chatml":
        raise UsageError(
            f"{options.chat_template!r} is neither jinja2 nor the name of a template",
            hint="--chat-template chatml, or --chat-template-file FILE",
        )
    return CHATML
