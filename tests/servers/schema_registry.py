"""A real schema registry for tests: Apicurio Registry, with its schemas on the test broker.

    with SchemaRegistryServer(broker) as registry:
        id = registry.register("orders-value", '"string"')
        run(broker, server, schema_registry_url=registry.url, ...)

It speaks as Confluent's does. It needs Java 17 or newer and, once, Maven to fetch it:
``python -m tests.servers.schema_registry --fetch``. It is kept where the broker's jars are.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from confluent_kafka.schema_registry import Schema, SchemaReference, SchemaRegistryClient

from pipeline.local.broker import KafkaBroker
from pipeline.local.jars import cache_folder, fetch_with_maven
from pipeline.local.processes import LocalServer, ServerError, free_ports, java_command

# 3.0 is the last for Java 17.
_VERSION = "3.0.9"
_ARTIFACT = f"io.apicurio:apicurio-registry-app:{_VERSION}:tar.gz:all"
_PATH = "/apis/ccompat/v7"


def registry_folder() -> Path:
    """The folder it is kept in; it exists only when it is complete."""
    return cache_folder() / f"apicurio-registry-{_VERSION}"


def fetch_registry() -> Path:
    """Return the folder with the registry; fetch it with Maven if it is not there yet.

    Raises:
        ServerError: Maven is missing or failed; its output is in the message.
    """
    unpack = ["dependency:unpack", f"-Dartifact={_ARTIFACT}", "-DmarkersDirectory=markers"]
    return fetch_with_maven(registry_folder(), "the schema registry", unpack)


class SchemaRegistryServer(LocalServer):
    """One registry process; a context manager. It can be stopped and started on the same port.

    Args:
        broker: The broker that keeps the schemas.
        start_timeout: Seconds until it must answer.
    """

    def __init__(self, broker: KafkaBroker, *, start_timeout: float = 240) -> None:
        super().__init__("registry", start_timeout)
        self._broker = broker
        (self._port,) = free_ports(1)

    @property
    def url(self) -> str:
        """What --schema_registry_url gets; the same over restarts."""
        return f"http://127.0.0.1:{self._port}{_PATH}"

    @property
    def client(self) -> SchemaRegistryClient:
        return SchemaRegistryClient({"url": self.url, "timeout": 60})

    def register(
        self,
        subject: str,
        schema: str,
        format: str = "AVRO",
        references: Sequence[tuple[str, str]] = (),
    ) -> int:
        """Register a schema; returns its id.

        Args:
            subject: Its subject.
            schema: Its text.
            format: ``AVRO``, ``PROTOBUF`` or ``JSON``.
            references: What it imports: by the name it uses, the subject (its version 1).
        """
        imported = [SchemaReference(name, subject, 1) for name, subject in references]
        id = self.client.register_schema(subject, Schema(schema, format, imported))
        assert isinstance(id, int)
        return id

    def _command(self, folder: Path) -> Sequence[str]:
        (jar,) = fetch_registry().glob("*-runner.jar")
        settings = {
            "apicurio.storage.kind": "kafkasql",
            "apicurio.kafkasql.bootstrap.servers": self._broker.bootstrap_servers,
            "quarkus.http.host": "127.0.0.1",
            "quarkus.http.port": self._port,
        }
        options = [f"-D{name}={value}" for name, value in settings.items()]
        java = java_command(str(jar), "-Xmx512m", "-XX:TieredStopAtLevel=1", *options)
        return [*java, "io.quarkus.runner.GeneratedMain"]

    def _is_up(self, name: str) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/subjects", timeout=10):
                return True
        except (urllib.error.URLError, OSError):
            return False


def _main(arguments: Sequence[str]) -> int:
    if list(arguments) == ["--fetch"]:
        try:
            fetch_registry()
        except ServerError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    if list(arguments) == ["--fetched"]:
        return 0 if registry_folder().is_dir() else 1
    print("usage: python -m tests.servers.schema_registry --fetch | --fetched", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
