"""What a client is told when its request cannot be answered, as OpenAI's API tells it."""

from __future__ import annotations

from ryot.errors import ConfigError, ContextError, RyotError


class ApiError(Exception):
    """A request that is refused; `param` names what is wrong in it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(_encodable(message))
        self.status = status
        self.kind = kind
        self.param = None if param is None else _encodable(param)
        self.code = code
        self.retry_after_s = retry_after_s

    def about(self, param: str) -> ApiError:
        """The same error of a field that the client knows by another name."""
        message = str(self)
        if self.param is not None and message.startswith(self.param):
            message = param + message[len(self.param) :]
        return ApiError(
            self.status, message, kind=self.kind, param=param, code=self.code, retry_after_s=self.retry_after_s
        )

    def body(self) -> dict[str, object]:
        """The error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def invalid(param: str | None, message: str) -> ApiError:
    """A field of the request is wrong."""
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


def api_error(error: RyotError, param: str | None = None) -> ApiError:
    """An error of the engine as the client sees it."""
    message = str(error) if error.hint is None else f"{error}; {error.hint}"
    if isinstance(error, ContextError):
        told = message if param is None else f"{param}: {message}"
        return ApiError(400, told, param=param, code="context_length_exceeded")
    if isinstance(error, ConfigError):
        return ApiError(400, message, param=param)
    return ApiError(500, message, kind="server_error")


def _encodable(text: str) -> str:
    """The text with halves of pairs, which JSON can hold and UTF-8 cannot, written out."""
    return text.encode("utf-8", "backslashreplace").decode()
