"""Secrets planted wherever one can be, in runs that succeed and in runs that fail: none is shown.

What is shown is all that leaves the process but to whom the secret is for: what it prints and logs,
at DEBUG, too; the page and what else it answers; its report; what it writes to topics; the
arguments and the environment of its processes; and what a job's workers are sent.
"""

from __future__ import annotations

import base64
import json
import re
import signal
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc

from pipeline.cli import main
from pipeline.local.broker import NewRecord
from pipeline.local.faults import Fault
from tests.conftest import Names
from tests.runs.test_http import Watched
from tests.servers.dataflow_service import everything_in
from tests.servers.registry_door import RegistryDoor
from tests.servers.secrets_manager import SecretsManager
from tests.servers.secure_broker import PASSWORD, REGION, USER, SecureBroker
from tests.servers.trace_collector import TraceCollector
from tests.servers.web_server import Quiet, WebServer
from tests.sink import (
    FUNCTION,
    Sink,
    Topics,
    failed,
    poison,
    serve,
)
from transforms.errors import UsageError
from transforms.kafka.client import KafkaConfig, make_consumer

PAGES = ("/", "/api/status", "/metrics", "/version", "/livez", "/readyz", "/none")


def plant() -> str:
    return f"planted-{uuid.uuid4().hex}"


def committed(broker: SecureBroker, topics: Topics) -> dict[int, int]:
    return broker.committed(topics.group, topics.source)


def assert_none(secrets: Iterable[str], shown: dict[str, str | bytes]) -> None:
    """None of the secrets is in any of the texts, as it is or in base64."""
    for secret in secrets:
        marks = [secret.encode(), base64.b64encode(secret.encode()).rstrip(b"=")[:-1]]
        for where, content in shown.items():
            found = content.encode() if isinstance(content, str) else content
            assert not [mark for mark in marks if mark in found], f"{secret} is shown in {where}"


class _Registry(WebServer):
    """A schema registry with one schema."""

    def __init__(self) -> None:
        class Handler(Quiet):
            def do_GET(self) -> None:
                is_it = self.path.startswith("/schemas/ids/1?") or self.path == "/schemas/ids/1"
                missing = {"error_code": 40403, "message": "Schema not found"}
                content = json.dumps({"schema": '"string"'} if is_it else missing).encode()
                self.send_response(200 if is_it else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        super().__init__(Handler)


@pytest.fixture
def door() -> Iterator[RegistryDoor]:
    """A registry that has to be logged in to, and that quotes what it refuses."""
    with _Registry() as registry, RegistryDoor(registry.url) as door:
        door.login, door.quotes = f"{USER}:{plant()}", True
        yield door


class Planted:
    """A run with secrets in each place: the environment, files, Secrets Manager.

    Attributes:
        secrets: All of them.
        env: The environment.
        options: What goes with all ways to say the logins.
    """

    def __init__(
        self, broker: SecureBroker, manager: SecretsManager, door: RegistryDoor, folder: Path
    ) -> None:
        self._broker, self._manager, self._door, self._folder = broker, manager, door, folder
        assert door.login
        token = folder / "token.txt"
        self.token = plant()
        token.write_text(self.token)
        self.password = PASSWORD
        key, self.session, header = plant(), plant(), plant()
        self.env = manager.env | {
            "AWS_SECRET_ACCESS_KEY": key,
            "AWS_SESSION_TOKEN": self.session,
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization={header}",
        }
        login = door.login.partition(":")[2]
        self.secrets = [PASSWORD, login, self.token, key, self.session, header]
        self.options = {
            "http": 0,
            "http_token_file": token,
            "page_show": "messages",
            "log_level": "DEBUG",
            "schema_registry_url": door.url,
            "trace": "otlp",
            "on_error": "log",
        }

    def logins(self, way: str) -> dict[str, Any]:
        """Options that say how to log in, one way or another; what they name is in its place."""
        if way == "mapping":
            secret = self._manager.keep(username=USER, password=self.password)
            registry = self._manager.keep(
                username=USER, password=str(self._door.login).partition(":")[2]
            )
            trusted = self._manager.keep(certificate=self._broker.ca.read_text())
            return {
                "kafka_bootstrap_servers": self._broker.plain,
                "kafka_access": f"BASIC_AUTH={secret},SERVER_ROOT_CA_CERTIFICATE={trusted}",
                "schema_registry_access": f"BASIC_AUTH={registry}",
            }
        if way == "certificate":
            certificate, key = self._broker.authority.issue(USER, self.password)
            # A line of the key, as it may be quoted.
            self.secrets += key.splitlines()[2:4]
            secret = self._manager.keep(
                certificate=certificate, privateKey=key, privateKeyPassword=self.password
            )
            trusted = self._manager.keep(certificate=self._broker.ca.read_text())
            text = f"schema.registry.basic.auth.user.info={self._door.login}"
            return {
                "kafka_bootstrap_servers": self._broker.mtls,
                "kafka_access": f"CLIENT_CERTIFICATE_TLS_AUTH={secret}"
                f",SERVER_ROOT_CA_CERTIFICATE={trusted}",
                "kafka_config_file": f"aws-secretsmanager://{self._manager.keep_text(text)}",
            }
        settings = {
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "PLAIN",
            "sasl.username": USER,
            "sasl.password": self.password,
            "response.sasl.password": self.password,
            "error.sasl.password": self.password,
            "ssl.ca.location": str(self._broker.ca),
            "schema.registry.basic.auth.user.info": str(self._door.login),
        }
        if way == "lines":
            self.env |= {"KAFKA_PASSWORD": self.password, "REGISTRY_LOGIN": str(self._door.login)}
            settings["error.sasl.password"] = "${env:KAFKA_PASSWORD}"
            settings["schema.registry.basic.auth.user.info"] = "${env:REGISTRY_LOGIN}"
        lines = [
            f"{name}{' : ' if n % 2 else '='}{text}"
            for n, (name, text) in enumerate(settings.items())
        ]
        if way == "manager":
            name = f"aws-secretsmanager://{self._manager.keep_text(json.dumps(settings))}"
        else:
            file = self._folder / "kafka.properties"
            file.write_text("\n".join(lines))
            name = str(file)
        return {"kafka_bootstrap_servers": self._broker.plain, "kafka_config_file": name}


@pytest.fixture
def planted(
    secure: SecureBroker, manager: SecretsManager, door: RegistryDoor, tmp_path: Path
) -> Planted:
    return Planted(secure, manager, door, tmp_path)


def processes(sink: Sink) -> dict[int, Path]:
    """The processes of a run."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            group = (folder / "stat").read_text().rpartition(")")[2].split()[2]
            if int(group) == sink.process.pid:
                found[int(folder.name)] = folder
    return found


@pytest.mark.parametrize("way", ["lines", "manager", "mapping", "certificate"])
def test_a_run_that_succeeds_shows_no_secret(
    secure: SecureBroker, names: Names, planted: Planted, tmp_path: Path, way: str
) -> None:
    """Nor does what it writes of records that fail, in it and in two workers."""
    topics = Topics(secure, names)
    records = [(p, b"k", b"\x00\x00\x00\x00\x01" + b"\x06abc") for p in (0, 1)]
    records.append((0, b"k", b"\x00\x00\x00\x00\x02\x06abc"))  # has a schema that is not there
    records.append((1, b"k", b"\x00\x00\x00\x00\x01\x06bad"))
    secure.produce(topics.source, [NewRecord(*each) for each in records])
    report = tmp_path / "report.html"
    shown: dict[str, str | bytes] = {}
    with TraceCollector() as collector, serve(poison("bad")) as server:
        options = planted.options | planted.logins(way) | topics.log_errors
        env = planted.env | {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        options |= {"report": report, "workers": 2, "batch_size": 1, "until": "forever"}
        with topics.start(server, env=env, **options) as sink:
            run = Watched(sink)
            done = {0: 2, 1: 2}
            sink.until(lambda: committed(secure, topics) == done, "not all is committed")
            for path in PAGES:
                shown[path] = run.get(path)[1]
            shown["a refusal"] = _told(run.url, "planted-by-nobody")
            shown["an answer"] = _told(run.url, planted.token)
            found = processes(sink)
            assert len(found) == 3
            for pid, folder in found.items():
                shown[f"arguments of {pid}"] = (folder / "cmdline").read_bytes()
            # What the environment of the first has is that of the others, too: it was forked.
            environments = {(folder / "environ").read_bytes() for folder in found.values()}
            assert len(environments) == 1
            given = "\n".join(env.values())
            kept = [secret for secret in planted.secrets if secret not in given]
            assert_none(kept, {"the environment": environments.pop()})
            sink.send(signal.SIGTERM)
            ended = sink.wait()
    shown |= {"stdout": ended.stdout, "stderr": ended.stderr, "report": report.read_bytes()}
    for topic in (topics.responses, topics.errors):
        shown[topic] = repr(secure.read_all(topic))
    shown["spans"] = repr(collector.spans)
    assert len(failed(secure, topics.errors)) == 2
    assert collector.spans
    assert_none(planted.secrets, shown)


def _told(url: str, token: str) -> bytes:
    """What is answered to who tells a run something."""
    request = urllib.request.Request(
        f"{url}/api/pause", b"{}", {"Authorization": f"Bearer {token}"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answered:
            return bytes(answered.read())
    except urllib.error.HTTPError as error:
        return str(error.headers).encode() + error.read()


REQUEST = (
    "The request signature we calculated does not match the signature you provided.\n\nThe "
    "Canonical String for this request should have been\n'POST\n/\n\nx-amz-security-token:{}\n'"
)


@pytest.mark.parametrize(
    ("way", "wrong", "said"),
    [
        ("mapping", "kafka", "Authentication failed"),
        ("certificate", "key", "ssl.key.pem"),
        ("lines", "registry", "does not give a look-up: Unauthorized: Basic ***, *** (HTTP 401)"),
        ("mapping", "registry", "does not give a look-up: Unauthorized: Basic ***, *** (HTTP 401)"),
        ("lines", "function", "The request signature we calculated does not match"),
    ],
)
def test_a_run_that_fails_shows_no_secret(
    secure: SecureBroker,
    names: Names,
    door: RegistryDoor,
    planted: Planted,
    way: str,
    wrong: str,
    said: str,
) -> None:
    """What refuses a login may quote it; the line that says so does not."""
    topics = Topics(secure, names)
    faults = []
    if wrong == "kafka":
        planted.password = plant()
        planted.secrets.append(planted.password)
    options = planted.options | planted.logins(way) | topics.log_errors
    if wrong == "key":
        garbled = f"-----BEGIN PRIVATE KEY-----\n{plant()}\n-----END PRIVATE KEY-----"
        planted.secrets.append(garbled.splitlines()[1])
        secret = planted._manager.keep(certificate=garbled, privateKey=garbled)
        options["kafka_access"] = f"CLIENT_CERTIFICATE_TLS_AUTH={secret}"
        said = "ssl.certificate.pem failed"
    elif wrong == "registry":
        door.login = f"{USER}:{plant()}"
    elif wrong == "function":
        text = REQUEST.format(planted.session)
        faults.append(
            Fault(
                status=403,
                error_type="InvalidSignatureException",
                message=text,
                times=None,
                invocation_types=("DryRun", "RequestResponse"),
            )
        )
    with serve(faults=faults) as server:
        ended = topics.run(server, None, env=planted.env, **options)
    assert ended.code in (1, 2)
    assert any(said in error for error in ended.errors), ended.stderr
    assert_none(planted.secrets, {"stdout": ended.stdout, "stderr": ended.stderr})


# -- options ---------------------------------------------------------------------------------------

SECRET = "Planted_s3cret/+=x"
_JAAS = f'org.apache.kafka.common.security.plain.PlainLoginModule required password="{SECRET}";'
_IAM_JAAS = f'software.amazon.msk.auth.iam.IAMLoginModule required awsSecret="{SECRET}";'
_PEM = f"-----BEGIN PRIVATE KEY-----{SECRET}"
_MAPPING = {
    "UUID": "5a7c",
    "FunctionArn": f"arn:aws:lambda:{REGION}:123456789012:function:{FUNCTION}",
    "Topics": ["orders"],
    "SelfManagedEventSource": {"Endpoints": {"KAFKA_BOOTSTRAP_SERVERS": ["127.0.0.1:1"]}},
    "SelfManagedKafkaEventSourceConfig": {"ConsumerGroupId": "orders"},
    "SourceAccessConfigurations": [{"Type": "SASL_SCRAM_512_AUTH", "URI": SECRET}],
}
_REGISTRY = ("--schema_registry_url=http://127.0.0.1:1",)


@pytest.mark.parametrize(
    ("option", "text", "more"),
    [
        ("kafka_config_file", SECRET, ()),
        ("kafka_config_file", f"sasl.jaas.config={_JAAS}", ()),
        ("kafka_config_file", f"response.sasl.jaas.config={_IAM_JAAS}", ()),
        ("kafka_config_file", f"aws.msk.secret={SECRET}", ()),
        ("kafka_config_file", f"sasl.password={SECRET}\ngroup.id={SECRET}", ()),
        ("kafka_config_file", f'{{"sasl.password": "{SECRET}",}}', ()),
        ("kafka_config_file", f'{{"sasl.password": ["{SECRET}"]}}', ()),
        ("kafka_config_file", f"schema.registry.ssl.key.location={_PEM}", _REGISTRY),
        ("kafka_config_file", f"schema.registry.basic.auth.user.info={SECRET}", _REGISTRY),
        ("kafka_config_file", f"schema.registry.timeout={SECRET}", _REGISTRY),
        ("http_token_file", f"{SECRET} {SECRET}", ("--http=0",)),
        ("config", json.dumps(_MAPPING), ()),
        (
            "config",
            json.dumps({"connector.class": "AwsLambdaSink", "kafka.api.secret": SECRET}),
            (),
        ),
        ("config", yaml.safe_dump({"kafka_access": f"BASIC_AUTH={SECRET}"}), ()),
        ("config", yaml.safe_dump({"kafka_access": f"BASIC_AUTH={SECRET},{SECRET}"}), ()),
        ("config", yaml.safe_dump({"schema_registry_access": SECRET}), _REGISTRY),
        ("config", yaml.safe_dump({"schema_registry_url": f"http://u:{SECRET}@h"}), ()),
        ("config", yaml.safe_dump({"lambda_endpoint_url": f"http://u:{SECRET}@h"}), ()),
    ],
)
@pytest.mark.parametrize("explained", [False, True])
def test_options_that_do_not_fit_show_no_secret(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    option: str,
    text: str,
    more: tuple[str, ...],
    explained: bool,
) -> None:
    """Neither in what is wrong with them nor in what would be in force."""
    file = tmp_path / "file.json"
    file.write_text(text)
    given = {
        "topics": "orders",
        "consumer_group": "orders",
        "function": FUNCTION,
        "kafka_bootstrap_servers": "127.0.0.1:1",
        "aws_region": REGION,
        option: file,
    }
    arguments = [f"--{name}={value}" for name, value in given.items()]
    arguments += [*more, *(["--explain"] if explained else [])]
    code = main([*arguments, "--log_level=DEBUG"])
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.err.startswith("error: ")
    assert_none([SECRET], {"out": printed.out, "err": printed.err, "log": caplog.text})


_OIDC = {
    "security.protocol": "SASL_SSL",
    "sasl.mechanism": "OAUTHBEARER",
    "sasl.oauthbearer.method": "oidc",
    "sasl.oauthbearer.client.id": "orders",
    "sasl.oauthbearer.client.secret": SECRET,
    "sasl.oauthbearer.token.endpoint.url": "https://127.0.0.1:1/",
}


@pytest.mark.parametrize(
    "settings",
    [
        {"sasl.mechanism": "${env:PLANTED}", "security.protocol": "SASL_SSL"},
        {"security.protocol": "${env:PLANTED}"},
        {"security.protocol": "SSL", "ssl.key.pem": SECRET},
        {"security.protocol": "SSL", "ssl.certificate.pem": SECRET},
        {"security.protocol": "SSL", "ssl.ca.pem": SECRET},
        {"security.protocol": "SSL", "ssl.key.location": SECRET, "ssl.key.password": SECRET},
        {"security.protocol": "SSL", "ssl.providers": "${env:PLANTED}"},
        {"sasl.pasword": SECRET},
        {**_OIDC, "ssl.ca.pem": SECRET},
        {**_OIDC, "ssl.key.pem": SECRET},
        {**_OIDC, "https.ca.location": SECRET},
        {**_OIDC, "sasl.oauthbearer.grant.type": "${env:PLANTED}"},
    ],
)
def test_settings_that_librdkafka_refuses_show_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    """One line, whatever they are; some of them ended the process."""
    monkeypatch.setenv("PLANTED", SECRET)
    file = tmp_path / "kafka.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(UsageError) as raised:
        make_consumer(KafkaConfig("127.0.0.1:1", "orders", str(file)))
    assert_none([SECRET], {"problems": str(raised.value)})
    (problem,) = raised.value.problems
    assert problem.endswith("see --kafka_config_file")


# -- jobs ------------------------------------------------------------------------------------------


class _JobService(beam_job_api_pb2_grpc.JobServiceServicer):
    """Takes a job as Flink's job server does, and goes no further."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []

    def DescribePipelineOptions(self, request: Any, context: Any) -> Any:
        return beam_job_api_pb2.DescribePipelineOptionsResponse()

    def Prepare(self, request: Any, context: Any) -> Any:
        self.jobs.append(request)
        context.abort(grpc.StatusCode.UNAVAILABLE, "it is not run here")


def test_a_job_for_flink_has_no_secret(
    secure: SecureBroker, names: Names, planted: Planted
) -> None:
    """Neither its pipeline nor its options; what names the secrets is in it."""
    topics, service = Topics(secure, names), _JobService()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    beam_job_api_pb2_grpc.add_JobServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    logins = planted.logins("mapping")
    options = planted.options | logins | topics.log_errors
    options |= {"runner": "PortableRunner", "job_endpoint": f"127.0.0.1:{port}"}
    try:
        with serve() as function:
            env = planted.env | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
            ended = topics.run(function, None, env=env, **options)
    finally:
        server.stop(None)
    (job, *_) = service.jobs
    content = b"\n".join(everything_in(job.SerializeToString()))
    content += json.dumps(str(job.pipeline_options)).encode()
    (arn, *_) = re.findall(r"arn:[^,]+", logins["kafka_access"])
    assert arn.encode() in content
    assert_none(
        planted.secrets, {"the job": content, "stdout": ended.stdout, "stderr": ended.stderr}
    )
