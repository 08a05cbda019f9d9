"""Kinesis by others: kinesis-mock and kinesalite, from npm, as processes of their own.

Each shows what the other does not: kinesis-mock knows ARNs, children and the size of an answer,
kinesalite is strict about sequence numbers and has AWS's own texts. Both need node.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions as aws_errors
from botocore.config import Config

from pipeline.local.jars import cache_folder
from pipeline.local.processes import ServerError, wait_until
from tests import sink

PACKAGES = {"kinesis-mock": ("kinesis-local", "0.6.2"), "kinesalite": ("kinesalite", "3.3.3")}
NEEDS = ("node", "npm")

# Both would listen for everybody.
_LOCAL_ONLY = """
const net = require('net'), listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (port, ...rest) {
  if (port && typeof port === 'object') return listen.call(this, { ...port, host: '127.0.0.1' });
  const then = rest.filter((each) => typeof each === 'function');
  return listen.call(this, Number(port), '127.0.0.1', ...then);
};
"""


def _fetch(package: str, version: str) -> Path:
    """The folder with a package; fetched once."""
    folder = cache_folder() / f"{package}-{version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        quiet = ("--ignore-scripts", "--no-audit", "--no-fund")
        done = subprocess.run(
            ["npm", "install", "--prefix", partial, *quiet, f"{package}@{version}"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            shutil.rmtree(partial)
            raise ServerError(f"npm cannot fetch {package}: {done.stderr[-500:]}")
        try:
            partial.rename(folder)
        except OSError:  # by another process
            shutil.rmtree(partial)
    return folder / "node_modules" / package


class NodeKinesis:
    """One of `PACKAGES`, as a context.

    Attributes:
        name: Which.
        url: Where it is.
        client: A boto3 client for it.
    """

    def __init__(self, name: str, port: int, tls_port: int) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        package = _fetch(*PACKAGES[name])
        self._files = tempfile.TemporaryDirectory()
        local = Path(self._files.name) / "local.js"
        local.write_text(_LOCAL_ONLY)
        settings: Mapping[str, str] = {}
        command = ["node", "-r", str(local)]
        if name == "kinesalite":
            command += [str(package / "cli.js"), "--port", str(port), "--shardLimit", "50"]
            command += ["--createStreamMs", "20", "--updateStreamMs", "20"]
        else:
            command += ["main.js"]
            durations = ("CREATE_STREAM", "SPLIT_SHARD", "MERGE_SHARDS")
            settings = {
                "KINESIS_MOCK_PLAIN_PORT": str(port),
                "KINESIS_MOCK_TLS_PORT": str(tls_port),
                "SHARD_LIMIT": "50",
                "LOG_LEVEL": "ERROR",
                **{f"{each}_DURATION": "0ms" for each in durations},
            }
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed on leaving)
        self._process = subprocess.Popen(
            command,
            cwd=package,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self.client: Any = boto3.client(
            "kinesis",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=sink.ACCESS_KEY,
            aws_secret_access_key=sink.SECRET_KEY,
            config=Config(retries={"total_max_attempts": 1}),
        )

    def __enter__(self) -> NodeKinesis:
        wait_until(self._answers, f"{self.name} does not answer", 60)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
        self._files.cleanup()

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            self._log.seek(0)
            raise ServerError(f"{self.name} has ended: {self._log.read()[-2000:]!r}")
        try:
            self.client.list_streams()
        except aws_errors.BotoCoreError:
            return False
        return True

    def _settled(self, name: str) -> None:
        def active() -> bool:
            summary = self.client.describe_stream_summary(StreamName=name)
            return bool(summary["StreamDescriptionSummary"]["StreamStatus"] == "ACTIVE")

        wait_until(active, f"{name} is not active", 30)

    def create_stream(self, name: str, shards: int) -> str:
        """Make a stream; returns its ARN."""
        self.client.create_stream(StreamName=name, ShardCount=shards)
        self._settled(name)
        summary = self.client.describe_stream_summary(StreamName=name)
        return str(summary["StreamDescriptionSummary"]["StreamARN"])

    def put(self, name: str, records: list[tuple[str, bytes]]) -> None:
        """Append records."""
        for low in range(0, len(records), 100):
            some = records[low : low + 100]
            entries = [{"PartitionKey": key, "Data": data} for key, data in some]
            answer = self.client.put_records(StreamName=name, Records=entries)
            assert answer["FailedRecordCount"] == 0

    def shards(self, name: str) -> list[dict[str, Any]]:
        """As they are listed."""
        return list(self.client.list_shards(StreamName=name)["Shards"])

    def split(self, name: str, number: int) -> None:
        """Split a shard in the middle."""
        shard = self.shards(name)[number]
        low, high = (int(shard["HashKeyRange"][f"{end}HashKey"]) for end in ("Starting", "Ending"))
        self.client.split_shard(
            StreamName=name,
            ShardToSplit=shard["ShardId"],
            NewStartingHashKey=str((low + high) // 2 + 1),
        )
        self._settled(name)

    def merge(self, name: str, number: int, other: int) -> None:
        """Merge two shards."""
        shards = self.shards(name)
        self.client.merge_shards(
            StreamName=name,
            ShardToMerge=shards[number]["ShardId"],
            AdjacentShardToMerge=shards[other]["ShardId"],
        )
        self._settled(name)
