"""Outcome: what each answer and each refusal of Lambda means."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.aws.answers import REPLY_TOO_LARGE, Fault, Reply
from transforms.invoke.outcome import Kind, Outcome, classify_fault, classify_reply
from transforms.invoke.reply import Answer, InvalidReplyError

CONFIG, TRANSIENT, THROTTLED = Kind.CONFIG, Kind.TRANSIENT, Kind.THROTTLED

# All errors of Invoke, by HTTP status, and what a client or a proxy adds.
FAULTS: list[tuple[int, str, Kind]] = [
    (400, "InvalidParameterValueException", CONFIG),
    (400, "InvalidRequestContentException", Kind.POISON),
    (400, "ModeNotSupportedException", CONFIG),
    (400, "NoPublishedVersionException", CONFIG),
    (400, "RecursiveInvocationException", CONFIG),
    (400, "SnapStartException", CONFIG),
    (402, "ServiceQuotaExceededException", CONFIG),
    (403, "EFSMountFailureException", CONFIG),
    (403, "S3FilesMountFailureException", CONFIG),
    (403, "AccessDeniedException", CONFIG),
    (403, "UnrecognizedClientException", CONFIG),
    (403, "InvalidSignatureException", CONFIG),
    (404, "ResourceNotFoundException", CONFIG),
    (408, "EFSMountConnectivityException", TRANSIENT),
    (408, "EFSMountTimeoutException", TRANSIENT),
    (408, "S3FilesMountConnectivityException", TRANSIENT),
    (408, "S3FilesMountTimeoutException", TRANSIENT),
    (408, "SnapStartTimeoutException", TRANSIENT),
    (409, "ResourceConflictException", TRANSIENT),
    (409, "SnapStartNotReadyException", TRANSIENT),
    (409, "CodeArtifactUserDeletedException", CONFIG),
    (409, "CodeArtifactUserPendingException", CONFIG),
    (409, "CodeArtifactUserFailedException", CONFIG),
    (409, "RuntimeAliasDeletedException", CONFIG),
    (409, "RuntimeVersionDeletedException", CONFIG),
    (409, "SnapStartRegenerationFailureException", CONFIG),
    (409, "DurableExecutionAlreadyStartedException", CONFIG),
    (410, "EFSIOException", TRANSIENT),
    (413, "RequestTooLargeException", Kind.TOO_LARGE),
    (413, "RequestEntityTooLargeException", Kind.TOO_LARGE),
    (413, "SerializedRequestEntityTooLargeException", Kind.TOO_LARGE),
    (413, "413", Kind.TOO_LARGE),
    (400, "RequestEntityTooLargeException", Kind.TOO_LARGE),
    (415, "UnsupportedMediaTypeException", CONFIG),
    (429, "TooManyRequestsException", THROTTLED),
    (429, "429", THROTTLED),
    (500, "ServiceException", TRANSIENT),
    (500, "InternalFailure", TRANSIENT),
    (502, "EC2ThrottledException", TRANSIENT),
    (502, "EC2UnexpectedException", TRANSIENT),
    (502, "ENILimitReachedException", TRANSIENT),
    (502, "ENINotReadyException", TRANSIENT),
    (502, "ResourceNotReadyException", TRANSIENT),
    (502, "SubnetIPAddressLimitReachedException", TRANSIENT),
    (502, "502", TRANSIENT),
    (502, "EC2AccessDeniedException", CONFIG),
    (502, "InvalidRuntimeException", CONFIG),
    (502, "InvalidSecurityGroupIDException", CONFIG),
    (502, "InvalidSubnetIDException", CONFIG),
    (502, "InvalidZipFileException", CONFIG),
    (502, "KMSAccessDeniedException", CONFIG),
    (502, "KMSDisabledException", CONFIG),
    (502, "KMSInvalidStateException", CONFIG),
    (502, "KMSNotFoundException", CONFIG),
    (503, "ServiceUnavailableException", TRANSIENT),
    (504, "504", TRANSIENT),
    (509, "BandwidthLimitExceeded", TRANSIENT),
    (0, "EndpointConnectionError", TRANSIENT),
    (0, "ConnectTimeoutError", TRANSIENT),
    (0, "ReadTimeoutError", TRANSIENT),
    (0, "ConnectionClosedError", TRANSIENT),
    (403, "ExpiredTokenException", TRANSIENT),
    (403, "ExpiredToken", TRANSIENT),
    (400, "RequestExpired", TRANSIENT),
    # Throttles and timeouts that AWS answers with 400, STS among those who do.
    (400, "Throttling", THROTTLED),
    (400, "ThrottlingException", THROTTLED),
    (400, "RequestLimitExceeded", THROTTLED),
    (400, "RequestTimeout", TRANSIENT),
    (400, "NoRegionError", CONFIG),
]


@pytest.mark.parametrize(("status", "code", "kind"), FAULTS)
def test_each_refusal_has_its_kind(status: int, code: str, kind: Kind) -> None:
    """What has to be done next depends on the code, and where that says nothing on the status."""
    outcome = classify_fault(Fault(status, code, "a message"))
    assert outcome.kind is kind
    assert outcome.error_type == code
    assert outcome.function_error == code
    assert outcome.message == "a message"
    assert outcome.status_code == status
    assert outcome.results is None


def test_what_the_refusal_said_is_kept() -> None:
    """How long to wait and the request's id travel with the outcome."""
    outcome = classify_fault(Fault(429, "TooManyRequestsException", "slow down", 2.5, "r-1"))
    assert outcome.retry_after_secs == 2.5
    assert outcome.request_id == "r-1"


@given(st.integers(400, 599), st.text(max_size=20).filter(lambda code: code != REPLY_TOO_LARGE))
@settings(deadline=None)
def test_no_refusal_is_a_success_or_a_function_error(status: int, code: str) -> None:
    """Whatever AWS makes up next, records are neither answered nor blamed for it."""
    kind = classify_fault(Fault(status, code, "")).kind
    assert kind not in (Kind.SUCCESS, Kind.FUNCTION_ERROR)
    if status >= 500:
        assert kind is not Kind.CONFIG or code in {c for _, c, k in FAULTS if k is CONFIG}


@pytest.mark.parametrize("word", ["Handled", "Unhandled", "", "anything"])
@pytest.mark.parametrize(
    ("payload", "error_type", "message"),
    [
        (b'{"errorType":"ValueError","errorMessage":"bad"}', "ValueError", "bad"),
        (
            b'{"errorMessage":"bad","errorType":"E","stackTrace":["a"],"requestId":"x"}',
            "E",
            "bad",
        ),
        (b'{"errorMessage":"2026-11-01 Task timed out after 3.00 seconds"}', "Unknown", None),
        (b'{"errorType":"Sandbox.Timeout"}', "Sandbox.Timeout", ""),
        (b'{"errorType":null,"errorMessage":null}', "Unknown", ""),
        (b'{"errorType":7,"errorMessage":["a"]}', "7", None),
        (rb'{"errorType":"E\ud83d","errorMessage":"bad \ud83d"}', "E?", "bad ?"),
        (b'{"errorType":"E","errorMessage":"bad","n":1e400}', "E", "bad"),
        (b"{}", "Unknown", ""),
        (b"null", "Unknown", ""),
        (b"[]", "Unknown", ""),
        (b'"text"', "Unknown", ""),
        (b"", "Unknown", ""),
        (b"not json", "Unknown", ""),
        (b"\xff\xfe", "Unknown", ""),
    ],
)
def test_a_function_error_is_known_by_its_header_alone(word, payload, error_type, message) -> None:
    """The header's presence counts, not its word; the body says more if it can be read."""
    looked_at: list[bytes] = []
    reply = Reply(200, payload, word, "bG9n", "$LATEST", "r-1")

    outcome = classify_reply(reply, lambda body: looked_at.append(body) or Answer())

    assert outcome.kind is Kind.FUNCTION_ERROR
    assert outcome.error_type == error_type
    if message is not None:
        assert outcome.message == message
    assert outcome.function_error == word
    assert outcome.log_result == "bG9n"
    assert outcome.executed_version == "$LATEST"
    assert outcome.request_id == "r-1"
    assert outcome.status_code == 200
    assert outcome.payload == payload.decode(errors="replace")
    assert not looked_at


def test_an_invalid_reply_is_a_function_error_of_its_own_type() -> None:
    """A reply that does not answer the batch fails it, and the error JSON says why."""

    def read(body: bytes) -> Answer:
        raise InvalidReplyError("entry 0 of the reply is wrong")

    outcome = classify_reply(Reply(200, b"[1]", None, "bG9n", "7", "r-1"), read)
    assert outcome.kind is Kind.FUNCTION_ERROR
    assert outcome.error_type == outcome.function_error == "InvalidReply"
    assert outcome.message == "entry 0 of the reply is wrong"
    assert json.loads(outcome.payload or "") == {
        "errorMessage": "entry 0 of the reply is wrong",
        "errorType": "InvalidReply",
    }
    assert (outcome.status_code, outcome.log_result) == (200, "bG9n")
    assert (outcome.executed_version, outcome.request_id) == ("7", "r-1")


def test_a_good_reply_is_a_success_with_its_results() -> None:
    """What the reply says is what the records are answered with."""
    reply = Reply(200, b"[]", None, None, "7", "r-1")
    outcome = classify_reply(reply, lambda body: Answer([body, b"2"], b"body"))
    assert outcome.kind is Kind.SUCCESS
    assert outcome.results == [b"[]", b"2"]
    assert outcome.body == b"body"
    assert outcome.error_type == ""
    assert (outcome.status_code, outcome.executed_version) == (200, "7")
    assert outcome.request_id == "r-1"


def test_a_reply_that_names_failures_is_a_partial_one() -> None:
    """It has all that an error of the function has, and says which records it is about."""
    reply = Reply(200, b"{}", None, "bG9n", "7", "r-1")
    outcome = classify_reply(reply, lambda body: Answer(failed=[0, 4]))
    assert outcome.kind is Kind.PARTIAL
    assert outcome.failed == [0, 4]
    assert outcome.error_type == outcome.function_error == "BatchItemFailure"
    assert json.loads(outcome.payload or "")["errorMessage"] == outcome.message
    assert (outcome.status_code, outcome.log_result) == (200, "bG9n")
    assert (outcome.executed_version, outcome.request_id) == ("7", "r-1")


def test_a_function_that_failed_in_some_records_works() -> None:
    """Only one that failed in all of them says no more than one that failed altogether."""
    partial = Outcome(Kind.PARTIAL, failed=[0, 1])
    assert partial.of_function(3) is Kind.SUCCESS
    assert partial.of_function(2) is Kind.FUNCTION_ERROR
    for kind in set(Kind) - {Kind.PARTIAL}:
        assert Outcome(kind).of_function(2) is kind


@pytest.mark.parametrize("body", [b"", b"null", b"not json"])
@pytest.mark.parametrize("status", [200, 202])
def test_a_reply_that_is_not_looked_at_is_a_success(status: int, body: bytes) -> None:
    """Where replies are not kept, any body will do; async invocations have none at all."""
    outcome = classify_reply(Reply(status, body), None)
    assert outcome.kind is Kind.SUCCESS
    assert outcome.results is None
    assert outcome.status_code == status
