"""AWS Secrets Manager for tests: moto's, over HTTP, for processes to ask."""

from __future__ import annotations

import json
import uuid
from contextlib import ExitStack

import boto3

from tests.servers.moto_server import moto_server
from tests.servers.secure_broker import REGION
from tests.sink import ACCESS_KEY, SECRET_KEY, environment


class SecretsManager:
    """The server, and the secrets in it; a context manager.

    Attributes:
        url: Where it is.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> SecretsManager:
        self.url = self._stack.enter_context(moto_server())
        self._client = boto3.client(
            "secretsmanager",
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def keep(self, **content: str) -> str:
        """A secret's ARN."""
        return self.keep_text(json.dumps(content))

    def keep_text(self, text: str) -> str:
        """The same, of one that is no JSON object."""
        made = self._client.create_secret(Name=f"orders-{uuid.uuid4().hex[:8]}", SecretString=text)
        return str(made["ARN"])

    def change(self, arn: str, **content: str) -> None:
        self._client.put_secret_value(SecretId=arn, SecretString=json.dumps(content))

    @property
    def env(self) -> dict[str, str]:
        """The environment of a run that asks it."""
        return environment(AWS_ENDPOINT_URL_SECRETS_MANAGER=self.url)
