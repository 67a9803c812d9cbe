# SPDX-License-Identifier: Apache-2.0
"""What a client is told when it gets no answer, in the shape of OpenAI's API."""

from collections.abc import Mapping
from typing import Any, NoReturn

from flaxlm.errors import ConfigError, DataError, FlaxLMError, NonFiniteError, one_line

INVALID, OVERLOADED, BROKEN = "invalid_request_error", "overloaded_error", "server_error"


class ApiError(Exception):
  """An answer with a status of 400 or above: why, which field, and a code for programs."""

  def __init__(
    self,
    status: int,
    message: str,
    kind: str = INVALID,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.kind = status, one_line(message), kind
    self.param, self.code, self.headers = param, code, headers or {}

  def as_json(self) -> dict[str, Any]:
    return {
      "error": {
        "message": self.message,
        "type": self.kind,
        "param": self.param,
        "code": self.code,
      }
    }


def refuse(param: str | None, message: str, code: str = "invalid_value") -> NoReturn:
  """Refuses a body for one of its fields."""
  raise ApiError(400, message, param=param, code=code)


def api_error(error: Exception, param: str | None = None) -> ApiError:
  """What a client is told of an error: one that it can fix, or a failure of ours."""
  if isinstance(error, ApiError):
    return error
  if isinstance(error, (ConfigError, DataError)):
    message = f"{error.cause}: {error.cure}" if error.cure else error.cause
    too_long = "model.context=" in error.cause
    code = "context_length_exceeded" if too_long else "invalid_value"
    return ApiError(400, message, param=param, code=code)
  if isinstance(error, NonFiniteError):
    return ApiError(500, error.cause, BROKEN, code="non_finite")
  cause = error.cause if isinstance(error, FlaxLMError) else type(error).__name__
  return ApiError(500, f"the server failed: {cause}", BROKEN, code="internal_error")
