"""What AWS answers besides success, in the terms of `rejoinder.adapters.errors`: one table for SQS, SNS and S3.

SQS speaks JSON and SNS the older query protocol, and their codes differ in prefix, suffix and case
(`AWS.SimpleQueueService.NonExistentQueue`, `KMSThrottlingException`, `KmsThrottled`): `_plain` takes that away first.
"""

from typing import Final

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigNotFound,
    ConfigParseError,
    CredentialRetrievalError,
    EndpointProviderError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    InvalidRegionError,
    MetadataRetrievalError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
    UnknownCredentialError,
)
from botocore.exceptions import (
    ConnectionError as HTTPConnectionError,
)
from botocore.parsers import ResponseParserError

from rejoinder.adapters.errors import AdapterError, BadURL, Denied, LeaseLost, NotFound, TooLarge, Transient

CODES: Final[dict[type[AdapterError], str]] = {
    Denied: """
        AccessDenied AccountProblem AllAccessDisabled AuthFailure AuthorizationError ExpiredToken IncompleteSignature
        InvalidAccessKeyId InvalidClientTokenId InvalidSecurity InvalidSignature InvalidToken MissingAuthenticationToken
        NotAuthorized OptInRequired SignatureDoesNotMatch TokenRefreshRequired UnauthorizedOperation
        UnrecognizedClient KmsAccessDenied KmsDisabled KmsInvalidKeyUsage KmsInvalidState KmsNotFound
        KmsOptInRequired InvalidObjectState KMS.Disabled KMS.InvalidKeyUsage KMS.InvalidState KMS.KMSInvalidState
        KMS.NotFound AuthorizationHeaderMalformed PermanentRedirect""",
    NotFound: """
        InvalidAddress NonExistentQueue NotFound QueueDoesNotExist ResourceNotFound TopicNotFound NoSuchBucket
        NoSuchKey""",
    TooLarge: "BatchRequestTooLong RequestEntityTooLarge EntityTooLarge",
    Transient: """
        BandwidthLimitExceeded ConcurrentAccess InternalError InternalFailure InternalServerError InternalService
        KmsThrottled KmsThrottling LimitExceeded OverLimit PriorRequestNotComplete QueueDeletedRecently
        RequestExpired RequestLimitExceeded RequestThrottled RequestTimeout RequestTimeTooSkewed ServiceUnavailable
        SlowDown Throttled Throttling TooManyRequests TransactionInProgress Unavailable BadDigest
        ConditionalRequestConflict IncompleteBody InvalidPart NoSuchUpload OperationAborted Redirect TemporaryRedirect
        XAmzContentChecksumMismatch XAmzContentSHA256Mismatch""",
    # HTTP 501: such as a service like S3 that knows no conditional writes, and never will.
    AdapterError: "NotImplemented",
}
"""The vendor's codes in short, each under what it means here."""

# Of the SDK's own errors the most specific comes first. What is not named is an answer that cannot be read.
_SDK: Final[tuple[tuple[tuple[type[Exception], ...], type[AdapterError]], ...]] = (
    ((NoRegionError, InvalidRegionError, EndpointProviderError), BadURL),
    ((CredentialRetrievalError, MetadataRetrievalError), Transient),
    (
        (
            NoCredentialsError,
            PartialCredentialsError,
            ProfileNotFound,
            ConfigNotFound,
            ConfigParseError,
            SSOError,
            TokenRetrievalError,
            UnauthorizedSSOTokenError,
            UnknownCredentialError,
        ),
        Denied,
    ),
    (
        (
            HTTPConnectionError,
            HTTPClientError,
            aiohttp.ClientError,
            OSError,
            ResponseParserError,
            IncompleteReadError,
            FlexibleChecksumError,
        ),
        Transient,
    ),
    ((BotoCoreError,), AdapterError),
)


def _plain(code: str) -> str:
    return code.removeprefix("AWS.SimpleQueueService.").removesuffix("Exception").casefold()


_KINDS: Final = {_plain(code): kind for kind, codes in CODES.items() for code in codes.split()}
_EXPIRED: Final = _plain("ExpiredToken")
_ELSEWHERE: Final = frozenset(
    map(_plain, ("AuthorizationHeaderMalformed", "IllegalLocationConstraint", "PermanentRedirect"))
)
# What AWS says, under the codes of wrong signatures, of a request that was signed too long ago or by a wrong clock: the
# machine was suspended, or its clock is about to be set.
_SKEWED: Final = ("Signature expired", "Signature not yet current")
_LOST: Final = frozenset(map(_plain, ("ReceiptHandleIsInvalid", "MessageNotInflight", "InvalidParameterValue")))


def from_exception(exc: Exception, permission: str, resource: str, *, renewed: bool = False) -> AdapterError:
    """Map whatever a call of the SDK raised.

    Args:
        exc: the SDK's exception.
        permission: the IAM action that the call needs, such as `sqs:ReceiveMessage`.
        resource: what it was called on: an ARN, or a URL as long as the ARN is not known.
        renewed: whether the credentials are renewed as they expire (a role's), and not for ever those of the start.
    """
    if isinstance(exc, ClientError):
        error = exc.response.get("Error", {})
        code, text, what = str(error.get("Code", "")), str(error.get("Message", "")), f"{permission} on {resource}"
        if renewed and _plain(code) == _EXPIRED:
            return Transient(_line(what, code, text, Transient))
        return _from_code(code, text, what, status=status_of(exc))
    if isinstance(exc, RecursionError):
        # To learn where it was redirected to, the SDK makes another call, which is redirected too.
        text = "the endpoint redirects every call, and names no region; check AWS_ENDPOINT_URL and the region"
        return AdapterError(f"{permission} on {resource}: {text}")
    kind = next((kind for classes, kind in _SDK if isinstance(exc, classes)), Transient)
    return kind(_line(f"{permission} on {resource}", type(exc).__name__, str(exc), kind))


def from_entry(entry: object, permission: str, resource: str) -> AdapterError:
    """Map one entry of a batch's `Failed`; of a batch that changes visibility or deletes, too."""
    fields = entry if isinstance(entry, dict) else {}
    code, text = str(fields.get("Code", "")), str(fields.get("Message", ""))
    status = 0 if fields.get("SenderFault") else 500
    return _from_code(code, text, f"{permission} on {resource}", status=status)


def lost(entry: object, message_id: str) -> LeaseLost | None:
    """Return the outcome where an entry of `Failed` says that the receipt is no longer good, else None.

    With checked parameters, InvalidParameterValue says one of: the receipt handle has expired, the message does not
    exist, or the total visibility timeout is beyond the limit (12 h from its receipt).
    """
    fields = entry if isinstance(entry, dict) else {}
    if _plain(str(fields.get("Code", ""))) not in _LOST:
        return None
    reason = " ".join(str(fields.get("Message", "")).split())
    reason = reason.partition("Reason: ")[2] or reason  # what stands before it is the handle, 200 characters long
    return LeaseLost(f"the lease of message {message_id} is lost: {fields.get('Code')}: {reason}")


def is_forbidden(exc: Denied) -> bool:
    """Whether the credentials are good, and only lack the permission for this call."""
    cause = exc.__cause__
    code = cause.response.get("Error", {}).get("Code", "") if isinstance(cause, ClientError) else ""
    return _plain(str(code)) in {_plain("AccessDenied"), _plain("AuthorizationError")}


def status_of(exc: ClientError) -> int:
    """Return the HTTP status of an answer that is no success."""
    return exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def is_lost_race(exc: Transient) -> bool:
    """Whether another write of the same object came between: at once, or by aborting this one's upload."""
    cause = exc.__cause__
    code = cause.response.get("Error", {}).get("Code") if isinstance(cause, ClientError) else None
    return code in {"ConditionalRequestConflict", "InvalidPart", "NoSuchUpload"}


def not_in_flight(entry: object) -> bool:
    """Whether an entry of `Failed` says that the message is there, and leased by nobody."""
    return isinstance(entry, dict) and _plain(str(entry.get("Code", ""))) == _plain("MessageNotInflight")


def _from_code(code: str, text: str, what: str, *, status: int) -> AdapterError:
    kind = Transient if any(one in text for one in _SKEWED) else _KINDS.get(_plain(code))
    if kind is None and ("must be shorter than" in text or "too long" in text.casefold()):
        kind = TooLarge
    if kind is None:  # HTTP 403 and 404 of a proxy in between say the same as the service's own
        by_status: dict[int, type[AdapterError]] = {403: Denied, 404: NotFound, 408: Transient, 413: TooLarge}
        kind = by_status.get(status) or (Transient if status == 429 or status >= 500 else AdapterError)
    return kind(_line(what, code, text, kind))


_HINTS: Final[dict[type[AdapterError], str]] = {
    Denied: "; allow it for these credentials, or use others",
    NotFound: "; check its name, account and region",
}


def _line(what: str, code: str, text: str, kind: type[AdapterError]) -> str:
    hint = "; check the region" if _plain(code) in _ELSEWHERE else _HINTS.get(kind, "")
    return f"{what}: {code or 'error'}: {' '.join(text.split()).rstrip('.')}{hint}"
