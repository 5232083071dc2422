"""What can be chosen about a server, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fomoe_io.errors import UsageError
from fomoe_io.text.sampler import SamplingConfig

LEAST_BODY_BYTES = 1 << 20
BODY_BYTES_PER_TOKEN = 32
"""A token is about four characters, and a character at most six bytes of JSON (\\u0000): with room to spare."""

MOST_CHOICES = 16
MOST_MESSAGES = 4096
MOST_STOPS = 64
MOST_PROBABILITIES = 100
MOST_REPORTED = 1 << 17
"""Probabilities of an answer that is sent whole: a kilobyte each until they are written.  Streams keep none."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """How to serve.

    Attributes
    ----------
    host : str
    port : int
        0 takes a free one.
    alias : str or None
        Name of the model in answers; None takes the model's own.
    api_keys : tuple of str
        Any of them is asked for; empty asks for none.
    allowed_hosts : tuple of str
        Names in a Host header beside addresses, localhost and this machine's name.
    allowed_origins : tuple of str
        Sites whose pages may call beside this machine's own; "*" lets all.
    queue_requests : int
        Requests that may wait.
    parallel : int
        Requests that are answered at once, each from a session of its own: `EngineConfig.sessions` has as many.
    body_bytes : int or None
        Largest body; None takes what a full context may need.
    sampling : SamplingConfig
        Where a request says nothing.
    chosen_sampling : mapping of str to Any or None
        What of it was chosen: the rest is what the model asks for (`general.sampling.*`).  None: `sampling` as it is.
    presence_penalty, frequency_penalty : float
    most_tokens : int
        Of an answer, whatever a request asks for; -1 is the context's end.
    piece_tokens : int or None
        Tokens of a prompt between two looks at whether the client is still there; None adapts.
    chat_template : str or None
        jinja2 source instead of the model's.
    splits_thoughts : bool
        Thoughts go to reasoning_content (thinking blocks, reasoning items), not into the text.
    thinking : bool or None
        `enable_thinking` of the template where a request says nothing.
    has_metrics, has_slots, has_page : bool
    keep_alive_seconds : float
        Between comments in a stream that has nothing to say.
    stall_seconds : float
        How long a client may take to accept what it is sent, or to send what it has announced.
    version : str
        Of the package, for /props.
    slot_folder : Path or None
        Where /slots saves sessions; None: nowhere.
    pending_events : int
        What may wait for a slow client of a stream before it is dropped.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    alias: str | None = None
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    queue_requests: int = 32
    parallel: int = 1
    body_bytes: int | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    chosen_sampling: Mapping[str, Any] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    most_tokens: int = -1
    piece_tokens: int | None = None
    chat_template: str | None = None
    splits_thoughts: bool = True
    thinking: bool | None = None
    has_metrics: bool = True
    has_slots: bool = True
    has_page: bool = True
    keep_alive_seconds: float = 5.0
    stall_seconds: float = 30.0
    version: str = ""
    pending_events: int = 1024
    slot_folder: Path | None = None

    def __post_init__(self) -> None:
        limits = {
            "port": (0, 65535),
            "queue_requests": (0, 4096),
            "parallel": (1, 64),
            "body_bytes": (1024, 1 << 30),
            "presence_penalty": (-100, 100),
            "frequency_penalty": (-100, 100),
            "most_tokens": (-1, 1 << 30),
            "piece_tokens": (1, 1 << 14),
            "keep_alive_seconds": (0.01, 3600),
            "stall_seconds": (0.01, 86400),
            "pending_events": (1, 1 << 20),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise UsageError(f"{name} is {value}, expected {least} to {most}")
        if not all(self.api_keys):
            raise UsageError("an API key is empty")

    def most_body_bytes(self, context_tokens: int) -> int:
        """Largest body that is read."""
        return self.body_bytes or max(LEAST_BODY_BYTES, BODY_BYTES_PER_TOKEN * context_tokens)
