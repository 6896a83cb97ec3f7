"""The calls of Cloud Storage's JSON API that a store needs, over google-auth's session, and what their answers mean.

Blocks: `gcs_store` makes the calls in threads. docs/dependencies.md says why not google-cloud-storage.
"""

import contextlib
import hashlib
import json
import os
import uuid
from base64 import b64encode
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final
from urllib.parse import quote

import google.auth
import requests
from google.auth import exceptions as auth_errors
from google.auth.transport.requests import AuthorizedSession
from requests.adapters import HTTPAdapter

from rejoinder.adapters.errors import AdapterError, Denied, NotFound, TooLarge, Transient

EMULATOR: Final = "STORAGE_EMULATOR_HOST"
SCOPES: Final = ("https://www.googleapis.com/auth/devstorage.read_write",)
TIMEOUT: Final = (60.0, 30.0)
"""Seconds to connect, which is also how long sending a body may take, and of silence after that."""
CONNECTIONS: Final = 128

_BY_STATUS: Final[Mapping[int, type[AdapterError]]] = {
    # Everything that a caller chooses is checked before: what is wrong is the bucket's policy or the KMS key.
    400: Denied,
    401: Denied,
    403: Denied,
    404: NotFound,
    408: Transient,
    409: Transient,
    410: Transient,
    413: TooLarge,
    429: Transient,
}
_HINTS: Final = {Denied: "; grant it to the identity that this runs as", NotFound: "; check the bucket's name"}


class Stands(AdapterError):
    """An object stands where none was to be (HTTP 412)."""


class Wire:
    """A session with the service, or with the emulator that its variable names."""

    def __init__(self, bucket: str) -> None:
        emulator = os.environ.get(EMULATOR)
        self._session: requests.Session
        if emulator:
            self._session = requests.Session()
            base = emulator if "://" in emulator else f"http://{emulator}"
        else:
            with mapped("finding credentials", f"gs://{bucket}"):
                credentials, _ = google.auth.default(scopes=SCOPES)
                self._session = AuthorizedSession(credentials)  # type: ignore[no-untyped-call]
                base = f"https://storage.{getattr(credentials, 'universe_domain', None) or 'googleapis.com'}"
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=CONNECTIONS, max_retries=0))
        name = quote(bucket, safe="")
        self.objects = f"{base.rstrip('/')}/storage/v1/b/{name}/o"
        self.uploads = f"{base.rstrip('/')}/upload/storage/v1/b/{name}/o"

    def call(self, permission: str, location: str, method: str, url: str, **settings: Any) -> requests.Response:
        """Make one call. Raises as `BlobStore`, and `Stands`."""
        with mapped(permission, location):
            response = self._session.request(method, url, timeout=TIMEOUT, allow_redirects=False, **settings)
            if response.status_code >= 400:
                with response:
                    raise _refusal(response, permission, location)
            return response

    def describe(self, permission: str, location: str, name: str) -> Any:
        """Return the object's metadata. Raises as `BlobStore.read`."""
        response = self.call(permission, location, "GET", f"{self.objects}/{quote(name, safe='')}")
        with mapped(permission, location):
            return response.json()

    def delete(self, permission: str, location: str, name: str) -> None:
        """Delete an object. Raises as `BlobStore.remove`, and NotFound for one that is not there."""
        self.call(permission, location, "DELETE", f"{self.objects}/{quote(name, safe='')}")

    def page(
        self, permission: str, location: str, prefix: str, token: str | None, *, size: int, start: str = ""
    ) -> tuple[list[tuple[str, float]], str | None]:
        """List objects whose names begin with `prefix`, from `start` on, and when each was written.

        A page may be empty.

        Returns the page, and the token of the next one, None at the end. Raises as `BlobStore.list`.
        """
        params = {"prefix": prefix, "maxResults": str(size), "fields": "items(name,updated),nextPageToken"}
        if start:
            params["startOffset"] = start
        if token is not None:
            params["pageToken"] = token
        response = self.call(permission, location, "GET", self.objects, params=params)
        with mapped(permission, location):
            page = response.json()
            found = [
                (str(one["name"]), datetime.fromisoformat(one["updated"]).timestamp()) for one in page.get("items", ())
            ]
            return found, page.get("nextPageToken")

    def close(self) -> None:
        """End all connections."""
        self._session.close()


@contextlib.contextmanager
def mapped(permission: str, location: str) -> Iterator[None]:
    """Raise as AdapterError what google-auth and requests raise: also an answer that was garbled is its failure."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as exc:
        kind: type[AdapterError] = Transient
        if isinstance(exc, auth_errors.DefaultCredentialsError):
            kind = Denied
        elif isinstance(exc, auth_errors.GoogleAuthError) and not isinstance(exc, auth_errors.TransportError):
            kind = Transient if getattr(exc, "retryable", False) else Denied
        raise kind(f"{permission} on {location}: {type(exc).__name__}: {' '.join(str(exc).split())}") from exc


def _refusal(response: requests.Response, permission: str, location: str) -> AdapterError:
    try:
        text = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = response.text[:300]  # a proxy's, or what a session of an upload says
    status = response.status_code
    kind = Stands if status == 412 else _BY_STATUS.get(status, Transient if status >= 500 else AdapterError)
    return kind(f"{permission} on {location}: {status}: {' '.join(text.split()).rstrip('.')}{_HINTS.get(kind, '')}")


class Download:
    """An object that is being read, over one connection."""

    def __init__(self, wire: Wire, name: str, location: str) -> None:
        self._wire = wire
        self._name = name
        self._location = location
        self._response: requests.Response | None = None
        self._left = 0
        self._hash = hashlib.md5(usedforsecurity=False)
        self._expected: str | None = None

    def open(self, permission: str) -> tuple[int, str | None]:
        """Open it as it is stored, not decompressed; gives its size and content type. Raises as `BlobStore.read`."""
        fields = self._wire.describe(permission, self._location, self._name)
        with mapped(permission, self._location):
            size, generation = int(fields["size"]), str(fields["generation"])
            self._expected = fields.get("md5Hash")  # composed objects have none
        # Of this generation: another one may come to stand there meanwhile.
        self._response = self._wire.call(
            permission,
            self._location,
            "GET",
            f"{self._wire.objects}/{quote(self._name, safe='')}",
            params={"alt": "media", "generation": generation},
            headers={"Accept-Encoding": "gzip"},
            stream=True,
        )
        self._left = size
        content_type = fields.get("contentType")
        return size, str(content_type) if content_type else None

    def read(self, permission: str, size: int) -> bytes:
        """Return the next bytes, none at the end. Raises as `BlobStore.read`."""
        if self._response is None or not self._left:
            return b""
        with mapped(permission, self._location):
            piece: bytes = self._response.raw.read(min(size, self._left), decode_content=False)
            if not piece:
                raise Transient(f"{self._location} broke off {self._left} bytes before its end")
        self._left -= len(piece)
        self._hash.update(piece)
        if not self._left and self._expected and b64encode(self._hash.digest()).decode() != self._expected:
            raise Transient(f"{self._location} was garbled on its way")
        return piece

    def close(self) -> None:
        """Let go of the connection; it is of use again if all was read."""
        if self._response is not None:
            self._response.close()


class Upload:
    """An object that is being written: in one call where its first part is its last, else in a resumable session."""

    def __init__(self, wire: Wire, name: str, location: str, settings: Mapping[str, str], kms_key: str | None) -> None:
        self._wire = wire
        self._location = location
        self._described = {"name": name, **settings}
        self._params = {"ifGenerationMatch": "0", "name": name} | ({"kmsKeyName": kms_key} if kms_key else {})
        self._hash = hashlib.md5(usedforsecurity=False)
        self._session: str | None = None
        self._sent = 0

    def send(self, permission: str, piece: bytes, *, last: bool) -> None:
        """Send the next part, 256 KiB times a whole number unless it is the last. Raises as `put`, and `Stands`."""
        self._hash.update(piece)
        if last and self._session is None:
            self._send_whole(permission, piece)
            return
        if self._session is None:
            self._begin(permission)
        start, self._sent = self._sent, self._sent + len(piece)
        span = f"{start}-{self._sent - 1}" if piece else "*"
        headers = {"Content-Range": f"bytes {span}/{self._sent if last else '*'}"}
        if last:
            headers["X-Goog-Hash"] = f"md5={self._md5()}"
        response = self._wire.call(permission, self._location, "PUT", str(self._session), data=piece, headers=headers)
        kept = response.headers.get("Range", "")
        if response.status_code != (200 if last else 308) or (not last and kept != f"bytes=0-{self._sent - 1}"):
            raise Transient(
                f"{permission} on {self._location}: the service kept {kept or 'nothing'} of {self._sent} bytes sent"
            )
        if last:
            self._session = None

    def _md5(self) -> str:
        return b64encode(self._hash.digest()).decode()

    def _send_whole(self, permission: str, piece: bytes) -> None:
        boundary = uuid.uuid4().hex
        described = json.dumps({**self._described, "md5Hash": self._md5()})
        head = f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{described}\r\n--{boundary}\r\n"
        head += f"Content-Type: {self._described['contentType']}\r\n\r\n"
        self._wire.call(
            permission,
            self._location,
            "POST",
            self._wire.uploads,
            params={"uploadType": "multipart", **self._params},
            headers={"Content-Type": f"multipart/related; boundary={boundary}"},
            data=b"".join((head.encode(), piece, f"\r\n--{boundary}--\r\n".encode())),
        )

    def _begin(self, permission: str) -> None:
        response = self._wire.call(
            permission,
            self._location,
            "POST",
            self._wire.uploads,
            params={"uploadType": "resumable", **self._params},
            headers={"X-Upload-Content-Type": self._described["contentType"]},
            json=self._described,
        )
        with mapped(permission, self._location):
            self._session = response.headers["Location"]

    def abandon(self, permission: str) -> None:
        """End a session that will not be completed. It shows nothing; the service forgets it after a week else."""
        if self._session is not None:
            # 499 says that it is done; and whatever else happens here, the caller is told of the first fault.
            with contextlib.suppress(AdapterError):
                self._wire.call(permission, self._location, "DELETE", self._session)
