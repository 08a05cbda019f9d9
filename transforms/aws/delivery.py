"""Delivery: documents about failed batches -> an SQS queue, an SNS topic or an S3 bucket. No Beam.

Lambda counts what it cannot deliver and drops it. Here it is tried again for a while, and then the
run ends before anything behind it is committed.
"""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import boto3
import botocore.exceptions as aws_errors
import orjson
from botocore.config import Config

from transforms.aws.credentials import Identity, session_of
from transforms.errors import WriteError
from transforms.per_process import per_process
from transforms.tally import DELIVERY_ERRORS, PULSE, TALLY

_LOGGER = logging.getLogger(__name__)

DESTINATION = re.compile(
    r"arn:aws[a-zA-Z-]*:(?:"
    r"(?P<service>sqs|sns):(?P<region>[a-z0-9-]+):(?P<account>\d{12}):(?P<name>[a-zA-Z0-9_-]{1,256})"
    r"|s3:::(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]))"
)

_AGAIN_SECS, _WAIT_SECS = 60.0, (0.5, 10.0)
_NAMESPACE = uuid.UUID("6ba7b812-9dad-11d1-80b4-00c04fd430c8")
_FINAL = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "AuthorizationError",
        "AWS.SimpleQueueService.NonExistentQueue",
        "ExpiredToken",
        "InvalidClientTokenId",
        "InvalidParameter",
        "InvalidParameterValue",
        "NoSuchBucket",
        "NotFound",
        "QueueDoesNotExist",
        "SignatureDoesNotMatch",
    }
)


@dataclass(frozen=True, slots=True)
class DeliveryConfig:
    """Where documents go, and who we are there. Holds no credentials.

    Attributes:
        destination: ARN of a queue, a topic or a bucket.
        pipeline: What tells this pipeline from others, for the names of objects.
        region: AWS region of a bucket; None for the chain's.
        role_arn: Role to assume, or None.
        web_identity: Whose token the role is assumed with; None for the chain's credentials.
        token_audience: Audience of that token.
    """

    destination: str
    pipeline: str = ""
    region: str | None = None
    role_arn: str | None = None
    web_identity: str | None = None
    token_audience: str = "sts.amazonaws.com"


class Delivery:
    """Delivers documents, one after the other.

    Args:
        config: Where to.
        sleep: Waits for so many seconds.

    Raises:
        WriteError: The client cannot be made.
    """

    def __init__(
        self, config: DeliveryConfig, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self._config = config
        self._sleep = sleep
        match = DESTINATION.fullmatch(config.destination)
        assert match
        self._match = match
        self._service = match["service"] or "s3"
        region = match["region"] or config.region or os.environ.get("AWS_REGION")
        settings = Config(
            user_agent="beam-lambda-sink",
            connect_timeout=5,
            read_timeout=20,
            retries={"total_max_attempts": 1},
        )
        identity = Identity(config.role_arn, config.web_identity, config.token_audience)
        try:
            session = session_of(identity, region)
            self._client: Any = boto3.Session(botocore_session=session, region_name=region).client(
                self._service, config=settings
            )
        except (aws_errors.BotoCoreError, ValueError) as error:
            raise self._failed(error) from None
        self._queue_url = ""

    def deliver(self, document: Mapping[str, Any], payload: bytes, place: str) -> None:
        """Deliver a document, repeated for a minute.

        Args:
            document: What is known of the failure.
            payload: The event that failed; goes into a bucket only, where there is room for it.
            place: Where its records are from, for the name of an object.

        Raises:
            WriteError: It is not delivered.
        """
        deadline = time.monotonic() + _AGAIN_SECS
        wait_secs, most = _WAIT_SECS
        while True:
            try:
                return self._deliver(document, payload, place)
            except (aws_errors.ClientError, aws_errors.BotoCoreError) as error:
                TALLY.count(DELIVERY_ERRORS, 1)
                if _code(error) in _FINAL or time.monotonic() > deadline:
                    raise self._failed(error) from None
                _LOGGER.warning("%s is tried again: %s", self._config.destination, _said(error))
            PULSE.beat()
            self._sleep(wait_secs)
            wait_secs = min(2 * wait_secs, most)

    def _deliver(self, document: Mapping[str, Any], payload: bytes, place: str) -> None:
        text = orjson.dumps(document).decode()
        if self._service == "sqs":
            self._client.send_message(QueueUrl=self._url(), MessageBody=text)
        elif self._service == "sns":
            self._client.publish(TopicArn=self._config.destination, Message=text)
        else:
            whole = orjson.dumps({**document, "payload": payload.decode()})
            self._client.put_object(
                Bucket=self._match["bucket"],
                Key=object_key(self._config.pipeline, place, datetime.now(timezone.utc)),
                Body=whole,
                ContentType="application/json",
            )

    def _url(self) -> str:
        if not self._queue_url:
            self._queue_url = self._client.get_queue_url(
                QueueName=self._match["name"], QueueOwnerAWSAccountId=self._match["account"]
            )["QueueUrl"]
        return self._queue_url

    def check(self) -> None:
        """See that it is there, as far as one may ask.

        Raises:
            WriteError: It is not there.
        """
        try:
            if self._service == "sqs":
                self._url()
            elif self._service == "sns":
                self._client.get_topic_attributes(TopicArn=self._config.destination)
            else:
                self._client.head_bucket(Bucket=self._match["bucket"])
        except (aws_errors.ClientError, aws_errors.BotoCoreError) as error:
            # To deliver may be allowed where to ask is not.
            if _code(error) not in ("AccessDenied", "AuthorizationError", "403"):
                raise self._failed(error) from None

    def _failed(self, error: Exception) -> WriteError:
        return WriteError(
            f"--on_failure_destination={self._config.destination} takes nothing: {_said(error)}"
        )


def object_key(pipeline: str, place: str, now: datetime) -> str:
    """Name of an object, in the form of AWS's; pure but for its random end."""
    mapping = uuid.uuid5(_NAMESPACE, pipeline)
    moment = now.strftime("%Y-%m-%dT%H.%M.%S")
    return f"aws/lambda/{mapping}/{place}/{now:%Y/%m/%d}/{moment}-{uuid.uuid4()}"


def _code(error: Exception) -> str:
    # Of a lost connection it is there, and None.
    response: Any = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _said(error: Exception) -> str:
    return " ".join(str(error).split())


def shared_delivery(config: DeliveryConfig) -> Delivery:
    """This process's delivery for the config."""
    return per_process(Delivery, config)
