"""A run whose credentials for MSK end again and again: is it ever held up?

``python -m tests.bench.tokens [--secs 600] [--token_secs 30]``

A broker takes tokens as MSK does, and ends a connection whose token is over. Records are written
all the time. At the end it says how often clients logged in, and what was the longest time in which
no invocation began. A record that is lost or has two outcomes, a login that was refused, or a
warning of a client is exit code 1.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from tests.conftest import Names
from tests.servers.credential_process import profile
from tests.servers.secure_broker import REGION, SecureBroker
from tests.sink import ACCESS_KEY, SECRET_KEY, Topics, environment, invocations, numbered, serve

STEP_SECS = 0.25


@dataclass
class Result:
    """What came of it.

    Attributes:
        logins: How often a connection was let in.
        answered: Records that have a response.
        longest_secs: The longest time in which no invocation began.
        wrong: What must not be, one line each.
    """

    logins: int
    answered: int
    longest_secs: float
    wrong: list[str] = field(default_factory=list)


def run_on(
    broker: SecureBroker, names: Names, folder: Path, secs: float, token_secs: float
) -> Result:
    """Write for so many seconds, with credentials of so many; then stop the run and look.

    Args:
        broker: What to log in to.
        names: Of topics and group.
        folder: For the files that the run is given.
        secs: How long records are written.
        token_secs: How long credentials are good for, and so tokens and connections.
    """
    properties = folder / "kafka.properties"
    properties.write_text(
        "security.protocol=SASL_SSL\nsasl.mechanism=AWS_MSK_IAM\n"
        "sasl.jaas.config=software.amazon.msk.auth.iam.IAMLoginModule required "
        'awsProfileName="msk";\n'
        "sasl.client.callback.handler.class=software.amazon.msk.auth.iam.IAMClientCallbackHandler\n"
        f"aws.msk.region={REGION}\nssl.ca.location={broker.ca}\n"
    )
    config = profile(folder, ACCESS_KEY, SECRET_KEY, token_secs)
    begun = len(broker.logins.read_text().splitlines())
    topics = Topics(
        broker,
        names,
        kafka_bootstrap_servers=broker.iam,
        kafka_config_file=properties,
        until="forever",
        env=environment(AWS_CONFIG_FILE=str(config)),
    )
    with serve() as server, topics.start(server) as sink:
        end = None
        count = 0
        while end is None or time.monotonic() < end:
            broker.produce(topics.source, numbered(2, 5, prefix=str(count)))
            count += 1
            if end is None:
                sink.until(lambda: bool(invocations(server)), "nothing is invoked")
                end = time.monotonic() + secs
            time.sleep(STEP_SECS)
        sink.until(lambda: not topics.missing(), "not all is answered")
        sink.send(signal.SIGTERM)
        ended = sink.wait()
        starts = [call.started for call in invocations(server)]
    topics.assert_exactly_once()
    topics.assert_caught_up()
    logins = broker.logins.read_text().splitlines()[begun:]
    wrong = [line for line in logins if " refused " in line]
    wrong += [line for line in ended.stderr.splitlines() if "WARNING" in line or "kafka:" in line]
    longest = max((later - earlier for earlier, later in pairwise(starts)), default=0)
    return Result(len(logins) - len(wrong), len(topics.sent()), longest, wrong)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.tokens")
    parser.add_argument("--secs", type=float, default=600)
    parser.add_argument("--token_secs", type=float, default=30)
    options = parser.parse_args(arguments)
    with SecureBroker() as broker, tempfile.TemporaryDirectory() as folder:
        result = run_on(broker, Names(), Path(folder), options.secs, options.token_secs)
    print(
        f"{result.answered} records answered, {result.logins} logins with tokens of "
        f"{options.token_secs:g} s, at most {result.longest_secs:.2f} s without an invocation"
    )
    for line in result.wrong:
        print(f"wrong: {line}")
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
