"""What a function may ask of its request and of its deployment: as watsonx.ai's `RuntimeContext`, and more."""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse


class Deployment:
    """What all requests of a process have in common.

    Args:
        params: The deployment's custom object.
        device: `cpu`, `cuda`, `cuda:N`, or `auto`.
        token: Gives the current token, where one is configured.
    """

    def __init__(
        self, params: Mapping[str, Any] | None = None, device: str = "auto", token: Callable[[], str] | None = None
    ) -> None:
        self.params: dict[str, Any] = dict(params or {})
        self.token = token
        self.state: Any = None
        """What `init` returned."""
        self._device = device

    @property
    def device(self) -> str:
        """Where the functions should run: `cuda`, `cuda:N` or `cpu`."""
        if self._device == "auto":
            self._device = "cuda" if _has_cuda() else "cpu"
        return self._device


def _has_cuda() -> bool:
    # A process that has torch knows by it; this module imports none.
    if (torch := sys.modules.get("torch")) is not None:
        return bool(torch.cuda.is_available())
    return Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in {"", "-1"}


class Context:
    """One request, or the deployment alone (in `init` and in a service's own call).

    Can be made by hand to test a function: `Context({"text": "hi"}, Deployment({"k": 1}))`.

    Args:
        request_payload_json: The body.
        deployment: Whose it is.
        path: The request's.
        headers: What its options say, by the names of HTTP's headers.
        response_id: See the attribute.
        created: See the attribute.
        task: The task that waits for the answer; asked whether it is being cancelled.
    """

    __slots__ = (
        "_cancelled",
        "_deployment",
        "_headers",
        "_task",
        "created",
        "path",
        "request_payload_json",
        "response_id",
    )

    def __init__(
        self,
        request_payload_json: Any = None,
        deployment: Deployment | None = None,
        *,
        path: str = "",
        headers: Mapping[str, str] | None = None,
        response_id: str = "",
        created: int = 0,
        task: "asyncio.Task[Any] | None" = None,
    ) -> None:
        self.request_payload_json = request_payload_json
        self.path = path
        self.response_id = response_id
        """Names the answer: the same whenever the request is tried again."""
        self.created = created
        """When the broker took the request, seconds since the epoch."""
        self._deployment = deployment or Deployment()
        self._headers = headers
        self._task = task
        self._cancelled = False

    @property
    def params(self) -> dict[str, Any]:
        """The deployment's custom object, `--app-params`."""
        return self._deployment.params

    @property
    def device(self) -> str:
        """Where to run: `cuda`, `cuda:N` or `cpu`."""
        return self._deployment.device

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more: it timed out, or was cancelled. Long functions look at it."""
        return self._cancelled or (self._task is not None and self._task.cancelling() > 0)

    def cancel(self) -> None:
        """Make `cancelled` True."""
        self._cancelled = True

    def get_json(self) -> Any:
        """The request's body."""
        return self.request_payload_json

    def get_bytes(self) -> bytes:
        """The request's body as bytes: of a text (by its Content-Type) the text, of all else JSON."""
        body = self.request_payload_json
        kind = next((value for name, value in (self._headers or {}).items() if name.lower() == "content-type"), "")
        if isinstance(body, str) and kind.strip().lower().startswith("text/"):
            return body.encode()
        return json.dumps(body).encode()

    def get_headers(self) -> dict[str, str]:
        """The headers that an HTTP request would have.

        Raises:
            RetryableError: see `get_token`.
        """
        headers = {"Content-Type": "application/json", "X-Request-Id": self.response_id}
        headers.update(self._headers or {})
        if self._deployment.token is not None:
            headers["Authorization"] = f"Bearer {self._deployment.token()}"
        return headers

    def get_token(self) -> str:
        """The current token.

        Raises:
            RuntimeError: the worker has none.
            RetryableError: its file is away or empty now.
        """
        if self._deployment.token is None:
            raise RuntimeError("no token is configured: start the worker with --token-file, or with REJOINDER_TOKEN")
        return self._deployment.token()

    def generate_token(self) -> str:
        """The same as `get_token`."""
        return self.get_token()

    def get_method(self) -> str:
        """What the method of an HTTP request would be."""
        return "POST"

    def get_path_suffix(self) -> str:
        """What follows `ai_service/` in the path, the query included; elsewhere nothing."""
        return self.path.partition("ai_service")[2].removeprefix("/")

    def get_query_parameters(self) -> dict[str, str]:
        """The parameters of the path's query, of several of one name the first."""
        return {name: values[0] for name, values in parse_qs(urlparse(self.path).query).items()}

    def get_space_id(self) -> str | None:
        """`space_id` of the deployment's custom object."""
        return self.params.get("space_id")
