"""What a request can be answered with instead of text: llama-server's error bodies."""

from __future__ import annotations

from typing import Any

from fomoe_io.errors import FomoeError


class ApiError(FomoeError):
    """An error that a client is told.

    Parameters
    ----------
    status : int
        Of HTTP.
    kind : str
        The body's `type`.
    message : str
    headers : dict of str to str, optional
    extra : Any
        More keys of the body.
    """

    def __init__(
        self, status: int, kind: str, message: str, *, headers: dict[str, str] | None = None, **extra: Any
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.headers = headers or {}
        self.extra = extra

    def document(self) -> dict[str, Any]:
        """The body, in llama-server's and OpenAI's form."""
        return {"error": {"code": self.status, "message": self.message, "type": self.kind, **self.extra}}


def bad_request(message: str, **extra: Any) -> ApiError:
    """400: the request is wrong, or asks for what this server does not do."""
    return ApiError(400, "invalid_request_error", message, **extra)


def context_exceeded(prompt_tokens: int, context_tokens: int) -> ApiError:
    """400: the prompt leaves no room for an answer."""
    return ApiError(
        400,
        "exceed_context_size_error",
        f"the request has {prompt_tokens} tokens, the context holds {context_tokens} (the server's -c)",
        n_prompt_tokens=prompt_tokens,
        n_ctx=context_tokens,
    )


def not_authorized() -> ApiError:
    """401."""
    return ApiError(401, "authentication_error", "Invalid API Key")


def forbidden(message: str) -> ApiError:
    """403: a browser was led here by another site."""
    return ApiError(403, "permission_error", message)


def too_large(limit_bytes: int) -> ApiError:
    """413."""
    return ApiError(413, "invalid_request_error", f"the body is larger than {limit_bytes} bytes (--max-body)")


def busy(waiting: int, retry_seconds: int) -> ApiError:
    """429: the queue is full."""
    return ApiError(
        429,
        "rate_limit_error",
        f"{waiting} requests are waiting already (--queue): try again in about {retry_seconds} s",
        headers={"retry-after": str(retry_seconds)},
    )


def internal_error() -> ApiError:
    """500: a fault of ours, told in full on the server's stderr only."""
    return ApiError(500, "server_error", "internal error: the server's stderr says more")


def not_supported(what: str) -> ApiError:
    """501: an endpoint of other servers."""
    return ApiError(501, "not_supported_error", f"this server does not support {what}")


def unavailable(message: str = "Loading model") -> ApiError:
    """503: not yet, or no longer."""
    return ApiError(503, "unavailable_error", message)
