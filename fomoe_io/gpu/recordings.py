"""A model recorded for a GPU at given addresses: a token's launches, and those of batches of any size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fomoe_io.gpu.arena import ALONE, WHOLE, Arena, DeviceExpertLayer, Mailbox, Memory, Part, Share
from fomoe_io.gpu.batch_recorder import BatchRecorder
from fomoe_io.gpu.budget import Header, Mail, RecordLayout
from fomoe_io.gpu.exchange import check_share
from fomoe_io.gpu.guess_recorder import GuessRecorder
from fomoe_io.gpu.products import padded
from fomoe_io.gpu.prompts import PromptInputs
from fomoe_io.gpu.weights import DeviceWeights
from fomoe_io.models.recorder import KvType

if TYPE_CHECKING:
    from fomoe_io.models.architecture import Build
    from fomoe_io.models.shape import Shape
    from fomoe_io.storage.store import TensorInfo


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the arenas of weights, activations and state begin, and the mail as the device sees it; 0 to count.

    outbox, inbox: those of :class:`Share`.
    """

    weights: int = 0
    activations: int = 0
    state: int = 0
    mail: int = 0
    outbox: int = 0
    inbox: int = 0


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What is recorded.

    Attributes
    ----------
    build : the model file's function
    resident : tensors that stay on the device
    files : descriptors of the store's files
    records : layouts of the experts' records by layer, which hold this device's share alone
    expert_inputs : forms of the activations that gate and up read, by layer
    substitutes : whether a token goes through cache-aware routing
    sessions : states that there are
    kv_type : what keys and values are kept as
    part : what this device computes
    guesses : how many of a layer's picks a token may guess
    share : of every product what this device makes
    """

    shape: Shape
    build: Build
    resident: Mapping[str, TensorInfo]
    files: list[int]
    records: Mapping[int, RecordLayout]
    expert_inputs: Mapping[int, tuple[int, int]]
    context_tokens: int
    substitutes: bool
    sessions: int = 1
    kv_type: KvType = KvType.F32
    part: Part = WHOLE
    guesses: int = 0
    share: Share = ALONE


class Recordings:
    """Recorders that share one memory.

    Parameters
    ----------
    source : ModelSource
    batch_tokens : int
        Of a full batch; 1: there are no batches.
    product_bytes : int
        Memory for the products of the vendor's library, 0 without it.
    addresses : Addresses

    Attributes
    ----------
    memory : Memory
    weights : DeviceWeights
    layers : dict of int to DeviceExpertLayer
    header, header_address : what a token's run begins with
    inputs, inputs_address : the same of a batch
    token : GuessRecorder
    exchange_bytes : int
        Of the memory behind outbox and inbox; alike on all devices that compute together.
    """

    def __init__(self, source: ModelSource, batch_tokens: int, product_bytes: int, addresses: Addresses) -> None:
        s = source.shape
        check_share(s, source.share.count)
        self._source = source
        self._share = replace(source.share, outbox=addresses.outbox, inbox=addresses.inbox)
        room = padded(batch_tokens) if product_bytes else batch_tokens
        self._weights_arena = Arena(addresses.weights)
        self.weights = DeviceWeights(source.resident, self._weights_arena, source.part)
        many = source.sessions > 1
        self.memory = Memory(
            Arena(addresses.activations), 0 if many else addresses.state, many, source.kv_type, room,
            source.context_tokens,
        )  # fmt: skip
        table, file, offset = self.weights.embedding(s.columns, s.vocabulary)
        self.embedding, self._embedding = table, (table, source.files[file], offset)
        self._place_inputs(batch_tokens)
        self.tables_address = self.memory.words("tables", 8 * s.layers * s.experts)
        self.products_address = self.memory.words("products", product_bytes) if product_bytes else 0
        self.mail = Mail(s.used, s.layers, source.guesses)
        self._mailbox = Mailbox(self.header_address, addresses.mail)
        self.layers = {
            i: DeviceExpertLayer(
                *record.kernels,
                record.device_offset,
                self.tables_address + 8 * s.experts * i,
                addresses.mail + self.mail.post(i),
                addresses.mail + self.mail.answer(i),
                tuple(addresses.mail + offset for offset in self.mail.guess(i)),
            )
            for i, record in source.records.items()
        }
        token = GuessRecorder(self.memory, substitutes=source.substitutes, guesses=source.guesses, **self._settings())
        self.token = self._recorded(token)
        self.exchange_bytes = behind = token.exchange.bytes
        share = self._share  # a batch's words are others: a token's are told by the number in them
        self._share = replace(share, outbox=share.outbox + behind, inbox=share.inbox + behind)
        for uses_products in (False, True) if product_bytes else (False,):
            if batch_tokens > 1:
                made = self.batch(batch_tokens, uses_products)
                self.exchange_bytes = behind + made.exchange.bytes
        self.memory.is_complete = True

    def _place_inputs(self, batch_tokens: int) -> None:
        """The token's header and the batch's inputs: one copy each before a run."""
        memory, s, row_bytes = self.memory, self._source.shape, self.embedding.row_bytes
        self.header = Header(1, row_bytes)
        self.header_address = memory.arena.take(self.header.bytes)
        memory.scratch["positions"] = self.header_address + self.header.positions
        memory.scratch["states"] = self.header_address + self.header.states
        memory.scratch["embedding"] = self.header_address + self.header.embedding
        self.inputs = PromptInputs.of(s, batch_tokens, row_bytes)
        self.inputs_address = memory.arena.take(self.inputs.device_bytes if batch_tokens > 1 else 0)
        memory.scratch["batch_positions"] = self.inputs_address + self.inputs.positions
        memory.scratch["batch_states"] = self.inputs_address + self.inputs.states
        memory.scratch["batch_embedding"] = self.inputs_address + self.inputs.embedding

    def _settings(self) -> dict[str, Any]:
        s = self._source.shape
        return {
            "embedding": self._embedding,
            "expert_inputs": self._source.expert_inputs,
            "experts": self.layers,
            "mailbox": self._mailbox,
            "vocabulary": s.vocabulary,
            "hidden": s.hidden,
            "part": self._source.part,
            "share": self._share,
        }

    def _recorded(self, recorder: Any) -> Any:
        source = self._source
        source.build(recorder, self.weights, source.shape)
        return recorder

    def batch(self, tokens: int, uses_products: bool) -> BatchRecorder:
        """The launches for so many tokens."""
        recorder = BatchRecorder(self.memory, tokens, uses_products=uses_products, **self._settings())
        return self._recorded(recorder)

    @property
    def fixed_bytes(self) -> tuple[int, int, int]:
        """Device bytes of weights, activations and states."""
        states = self._source.sessions * self.token.state.bytes
        return self._weights_arena.bytes, self.memory.arena.bytes, states
