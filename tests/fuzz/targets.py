"""What is done with each kind of input: everything that a user's command would do with such a file, made small."""

from __future__ import annotations

import contextlib
import json
import lzma
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fomoe_io import Engine, EngineConfig, Tiers
from fomoe_io.cli.bench_cache import run as bench_cache
from fomoe_io.errors import FomoeError
from fomoe_io.experts.car import CarRule
from fomoe_io.experts.profile import FREQ_MAGIC, Profile
from fomoe_io.io_bench.job_file import read_job_file
from fomoe_io.storage.calibration import Calibration
from fomoe_io.storage.manifest import MANIFEST, METADATA, file_checksum, seal
from fomoe_io.storage.store import Store
from fomoe_io.text.chat import ChatTemplate
from fomoe_io.text.sampler import Sampler, SamplingConfig
from layout_tool.main import _main as layout
from tests.fuzz.gguf_image import STRING, Image, Key
from tests.fuzz.mutate_gguf import bases, flipped, mutated
from tests.fuzz.mutate_text import mutated_json, mutated_template, other_numbers
from tests.tiny_model import Tiny, Type, write_tiny

Target = Callable[[random.Random, int], None]
CONTEXT_TOKENS = 24
MESSAGES = [
    {"role": "user", "content": "hello ü"},
    {"role": "assistant", "content": "x"},
    {"role": "user", "content": ""},
]


def _config(r: random.Random) -> EngineConfig:
    """Any way to run a model; mostly kernels of our own, in which a sanitizer sees every access."""
    return EngineConfig(
        threads=r.choice([1, 2]),
        context_tokens=CONTEXT_TOKENS,
        batch_tokens=r.choice([1, 4, 16]),
        reader=r.choice(["pread", "uring"]),
        kernels=r.choice(["portable", "portable", "portable", "ggml"]),
        activations=r.choice(["quantized"] * 7 + ["float32"]),
        policy=r.choice(["lru", "lfu", "decayed", "lfru"]),
        tiers=r.choice([None, Tiers(0, 0.3), Tiers(0.2, 0.3)]),
        lookahead=r.choice([0, 0, 2]),
        car=r.choice([None, None, CarRule.parse("regret:0.3")]),
    )


def _decode(path: Path, r: random.Random) -> None:
    """Open a model, read a prompt, write a few tokens."""
    with Engine.open(path, _config(r)) as engine:
        tokenizer, sampler = engine.tokenizer, Sampler(SamplingConfig(seed=1, repeat_penalty=1.1))
        prompt = tokenizer.encode("hello <|endoftext|> ü\n1", special=True, add_bos=True)[: CONTEXT_TOKENS - 6]
        template = ChatTemplate.from_metadata(engine.metadata, bos_text="a", eos_text="b")
        if template is not None:
            template.render(MESSAGES)
        session = engine.session()
        logits = session.prefill(prompt or [0])
        for _ in range(4):
            token = sampler.sample(logits)
            sampler.accept(token)
            tokenizer.decode([token], special=True)
            logits = session.decode(token)
        engine.statistics()
        engine.memory_lines()
        session.close()


def gguf_files(folder: Path) -> Target:
    """Models as they are downloaded: run where they lie, or packed and looked at."""
    originals = bases(folder)
    path = folder / "mutated.gguf"

    def run(r: random.Random, number: int) -> None:
        path.write_bytes(mutated(r, originals, folder))
        if number % 5:
            _decode(path, r)
        else:
            store = folder / "store"
            shutil.rmtree(store, ignore_errors=True)
            layout(["inspect", str(path)])
            layout(["plan", str(path)])
            layout([r.choice(["pack", "index"]), str(path), "--to", str(store)])
            layout(["inspect", str(store), "--json"])
            _decode(store, r)

    return run


def manifests(folder: Path) -> Target:
    """Stores whose manifest, metadata or data have been changed; the seal is mostly right."""
    model = write_tiny(folder / "model.gguf", Tiny(weights=Type.Q8_0), 1)
    whole = folder / "whole"
    layout(["pack", str(model), "--to", str(whole)])
    index = folder / "index"
    layout(["index", str(model), "--to", str(index), "--checksums"])

    def run(r: random.Random, number: int) -> None:
        source = whole if number % 4 else index
        store = folder / "store"
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(source, store)
        path = store / MANIFEST
        raw = path.read_bytes()
        body = json.loads(raw)
        body.pop("xxh3_64")
        what = r.randrange(10)
        if what == 0:
            path.write_bytes(flipped(r, raw))
        elif what == 1:
            name = r.choice([p.name for p in store.iterdir() if p.name != MANIFEST] or [MANIFEST])
            (store / name).write_bytes(flipped(r, (store / name).read_bytes(), 1 << 16))
            if name == METADATA and r.random() < 0.8:
                body["metadata"] = {"bytes": (store / name).stat().st_size, "xxh3_64": file_checksum(store / name)}
            path.write_bytes(seal(body))
        else:
            path.write_bytes(_sealed(mutated_json(r, body), raw))
        for command in ("inspect", "verify"):
            with contextlib.suppress(FomoeError):
                layout([command, str(store)])
        _decode(store, r)

    return run


def _sealed(body: object, raw: bytes) -> bytes:
    return seal(body) if isinstance(body, dict) else json.dumps(body).encode()


def profiles(folder: Path) -> Target:
    """All three formats, and calibrations, fitted to a model."""
    model = write_tiny(folder / "model.gguf", Tiny(layers=2), 1)
    store = Store.open(model)
    experts = {number: layer.n_experts for number, layer in store.experts.items()}
    random_ = np.random.default_rng(1)
    picks = {number: random_.integers(0, 50, count) for number, count in experts.items()}
    document = json.loads(_saved(folder, Profile(100, picks, "x", store.fingerprint)))
    entries = [struct.pack("<HHf", layer, e, (e + 1) / 40) for layer in experts for e in range(experts[layer])]
    freq = struct.pack("<4I", FREQ_MAGIC, 1, len(experts), len(entries)) + b"".join(entries)
    imatrix = _imatrix(folder, experts)
    point = {"block_bytes": 4096, "depth": 1, "bytes_per_second": 1e9, "p50_us": 9.0, "p99_us": 99.0}
    points = [
        {**point, "depth": depth, "cpu_us_per_read": 1.0, "block_bytes": b} for depth in (1, 8) for b in (4096, 65536)
    ]
    calibration = {"format": "fomoe-calibration", "version": 1, "engine": "uring", "direct": True, "points": points,
                   "system": {"cpu": "x"}}  # fmt: skip

    def run(r: random.Random, number: int) -> None:
        path, kind = folder / "mutated", number % 5
        if kind == 4:
            path.write_text(json.dumps(mutated_json(r, calibration)))
            Calibration.load(path).reads(r.choice([1, 4096, 1 << 20, 7 << 20]))
            return
        if kind == 0:
            path.write_text(json.dumps(mutated_json(r, document)))
        elif kind == 1:
            path.write_bytes(flipped(r, json.dumps(document).encode(), 256))
        elif kind == 2:
            path.write_bytes(flipped(r, freq, 64))
        else:
            path.write_bytes(mutated(r, [imatrix], folder))
        profile = Profile.load(path)
        profile.frequencies(experts)
        with Engine.open(model, EngineConfig(context_tokens=8, threads=1, profile=path)) as engine:
            engine.session().decode(1)

    return run


def _saved(folder: Path, profile: Profile) -> bytes:
    profile.save(folder / "profile.json")
    return (folder / "profile.json").read_bytes()


def _imatrix(folder: Path, experts: dict[int, int]) -> Image:
    image = Image.read(write_tiny(folder / "imatrix.gguf", Tiny(layers=1, weights=Type.F32), 2))
    like = image.tensors[0]
    image.keys = [
        Key(b"imatrix.chunk_count", 4, 3),
        Key(b"imatrix.chunk_size", 4, 64),
        Key(b"general.type", STRING, b"x"),
    ]
    image.tensors = [
        type(like)(f"blk.{layer}.ffn_gate_exps.weight.counts".encode(), [1, count], 0, 0,
                   bytearray(np.arange(count, dtype="<f4").tobytes()))
        for layer, count in experts.items()
    ]  # fmt: skip
    image.lay_out()
    return image


def traces(folder: Path) -> Target:
    """Our own, BigMoeOnEdge's, plain and compressed, and fio's job files."""
    model = write_tiny(folder / "model.gguf", Tiny(layers=2), 1)
    own = folder / "own.trace"
    with Engine.open(model, EngineConfig(context_tokens=32, threads=1, trace=own, tiers=Tiers(0.2, 0.3))) as engine:
        session = engine.session()
        session.prefill(range(9))
        for token in range(6):
            session.decode(token)
    raw = own.read_bytes()
    rows = [f"0,{int(step > 0)},{step},{layer},{slot},{(step + slot) % 4},{0.5 - slot / 9},0,100"
            for step in range(4) for layer in range(2) for slot in range(2)]  # fmt: skip
    route = "\n".join(
        ["# route_trace v1", "# model=tiny n_layer=2 n_expert=4 n_expert_used=2", "# layer=0 expert_bytes=100",
         "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes", *rows, ""]
    )  # fmt: skip
    job = "[global]\nrw=randread\nbs=4k\nsize=1m\nruntime=2s\n[a]\nfilename=/tmp/x\niodepth=8\nnumjobs=2\n"

    def run(r: random.Random, number: int) -> None:
        path, kind = folder / "mutated", number % 6
        if kind == 5:
            path.write_text(other_numbers(r, job))
            read_job_file(path)
            return
        if kind < 2:
            data = _own_trace(r, raw)
        elif kind == 2:
            data = flipped(r, route.encode(), r.choice([100, len(route)]))
        elif kind == 3:
            data = other_numbers(r, route).encode()
        else:
            data = flipped(r, lzma.compress(route.encode()), 100)
        path.write_bytes(data)
        how = r.choice([["--tiers", "vram=20%,dram=30%"], ["--sizes", "1%,50%"], ["--sizes", "30%", "--single"]])
        bench_cache([str(path), "--policy", "lru,decayed,belady", *how])

    return run


def _own_trace(r: random.Random, raw: bytes) -> bytes:
    """Its header changed as JSON, or its records' bytes; now and then any byte."""
    (size,) = struct.unpack_from("<I", raw, 12)
    start = 16 + size
    if r.random() < 0.2:
        return flipped(r, raw, len(raw))
    header, records = raw[16:start], raw[start:]
    if r.random() < 0.5:
        header = json.dumps(mutated_json(r, json.loads(header))).encode()
    else:
        records = flipped(r, records, r.choice([8, 100, len(records)]))
    return raw[:12] + struct.pack("<I", len(header)) + header + records


def templates(folder: Path) -> Target:
    """Chat templates, alone: rendering them is all that is done with them."""

    def run(r: random.Random, number: int) -> None:
        source = mutated_template(r, number)
        template = ChatTemplate(source, bos_text="<s>", eos_text="</s>")
        template.render(MESSAGES)
        template.render([{"role": "system", "content": "\0"}, *MESSAGES], enable_thinking=False)

    return run


TARGETS: dict[str, Callable[[Path], Target]] = {
    "gguf": gguf_files,
    "manifest": manifests,
    "profile": profiles,
    "trace": traces,
    "template": templates,
}
