"""The body of a response whose status code is 400 or above."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class ErrorDetail(BaseModel):
    """What went wrong, in the shape of OpenAI's API."""

    model_config = ConfigDict(strict=True, frozen=True)

    message: str
    """One sentence that names the field and what is allowed."""
    type: str
    param: str | None = None
    """The field at fault, as a path from the envelope or body: `options.deadline`, `messages.0.role`."""
    code: str | None = None


class ErrorBody(BaseModel):
    """`{"error": {...}}`."""

    model_config = ConfigDict(strict=True, frozen=True)

    error: ErrorDetail

    @classmethod
    def of(cls, detail: ErrorDetail) -> dict[str, Any]:
        """The JSON value of a body with this detail."""
        return {"error": detail.model_dump()}
