"""A job on Dataflow with Beam's own reader, which a real expansion service makes: it is Java's.

Nothing runs there; what is looked at is the pipeline that was submitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from apache_beam.portability.api import beam_runner_api_pb2 as beam_pb2

from pipeline.local.broker import KafkaBroker
from pipeline.local.jars import classpath
from pipeline.local.processes import ServerProcess, free_ports, is_listening, java_command
from tests.conftest import Names
from tests.servers.dataflow_service import DataflowService, Submitted, submit, unsnapped

pytestmark = [pytest.mark.slow, pytest.mark.flink]

IMAGE = "europe-west1-docker.pkg.dev/demo-project/beam/beam-lambda-sink:0.1.0"


@pytest.fixture(scope="module")
def expansion_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of the service, with the environment that a cluster of containers has."""
    folder = tmp_path_factory.mktemp("expansion")
    # It wants one jar at least that it may hand to the job.
    jar = folder / "staged.jar"
    jar.write_bytes(b"a jar")
    (port,) = free_ports(1)
    command = [
        *java_command(f"{classpath('flink')}:{jar}", "-Xmx256m", "-XX:TieredStopAtLevel=1"),
        "org.apache.beam.sdk.expansion.service.ExpansionService",
        str(port),
        "--javaClassLookupAllowlistFile=*",
        f"--filesToStage={jar}",
    ]
    process = ServerProcess("expansion-service", command, folder)
    process.start()
    try:
        process.wait_until_up(lambda: is_listening(port), 120)
        yield f"127.0.0.1:{port}"
    finally:
        process.end()


@pytest.fixture(scope="module")
def service() -> Iterator[DataflowService]:
    with DataflowService() as running:
        yield running


@pytest.fixture
def job(
    service: DataflowService,
    expansion_service: str,
    broker: KafkaBroker,
    names: Names,
    tmp_path: Path,
) -> Submitted:
    """Its topics are found by a regular expression, which is the program's part."""
    for name in ("a", "b"):
        broker.create_topic(names.topic(f"orders-{name}"), 1)
    suffix = names.topic("").removeprefix("-")
    job, program = submit(
        service,
        tmp_path,
        f"--kafka_bootstrap_servers={broker.bootstrap_servers}",
        "--topics=",
        f"--topics_regex=orders-[ab]-{suffix}",
        f"--consumer_group={names.group()}",
        "--kafka_reader=beam",
        f"--expansion_service={expansion_service}",
        f"--sdk_container_image={IMAGE}",
    )
    assert program.returncode == 0, program.stderr
    return job


def test_java_reads_and_python_does_the_rest(
    job: Submitted, broker: KafkaBroker, names: Names
) -> None:
    transforms = job.pipeline.components.transforms
    in_java = {
        transform.unique_name: transform
        for transform in transforms.values()
        if "java" in job.container_images.get(transform.environment_id, "")
    }
    assert all(name.startswith("Read/ReadFromKafka/") for name in in_java)
    reads = [
        transform
        for transform in in_java.values()
        if transform.spec.urn == "beam:transform:pardo:v1"
        and beam_pb2.ParDoPayload.FromString(transform.spec.payload).restriction_coder_id
    ]
    assert reads, "no splittable DoFn reads"
    # The configuration, as the Java half keeps it.
    held = b"".join(unsnapped(transform.spec.payload) for transform in in_java.values())
    for part in (
        broker.bootstrap_servers,
        names.topic("orders-a"),
        names.topic("orders-b"),
        names.group(),
        "enable.auto.commit",
        "read_committed",
    ):
        assert part.encode() in held, part
    assert job.steps["Read/Pack"].environment not in {t.environment_id for t in in_java.values()}
    assert "Read/FindPartitions" not in job.steps
    assert {"BatchAndInvoke/Pending", "Commit/CommitPartition"} <= set(job.steps)


def test_each_half_has_an_image(job: Submitted) -> None:
    assert IMAGE in job.images
    (java,) = [image for image in job.images if image != IMAGE]
    # Google's copy of Beam's own.
    assert java.startswith("gcr.io/cloud-dataflow/v1beta3/beam_java")
    jars = [package["name"] for package in job.pool["packages"] if ".jar" in package["name"]]
    assert len(jars) == 1 and jars[0].startswith("staged-")


def test_where_there_is_no_committed_offset_the_program_commits_the_beginning(
    job: Submitted, broker: KafkaBroker, names: Names
) -> None:
    assert broker.committed(names.group(), names.topic("orders-a")) == {0: 0}
