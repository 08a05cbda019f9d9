"""Resolve: the command line, and what it comes to."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.options.resolve import parse_arguments
from tests.pipeline.options.given import BESIDE, CASES, FLAGS, REQUIRED, TOKEN, arguments_of
from transforms.errors import UsageError


@pytest.mark.parametrize("name", FLAGS)
def test_flags_on_the_command_line(name: str) -> None:
    """A flag alone is true; with a value it is that."""
    find = CASES[name][0]
    given = {**REQUIRED, **BESIDE.get(name, {})}
    beside = [f"--{other}={value}" for other, value in given.items() if value is not None]
    for argument, value in ((name, True), (f"{name}=true", True), (f"{name}=false", False)):
        config, _ = parse_arguments([*beside, f"--{argument}"])
        assert find(config) is value


def test_preflight_has_a_no() -> None:
    """A flag that is on by default can be switched off by its name."""
    assert parse_arguments(arguments_of())[0].run.preflight is True
    assert parse_arguments(arguments_of("--no_preflight"))[0].run.preflight is False


def test_a_value_may_stand_alone() -> None:
    """`--name value` is the same as `--name=value`, negative numbers among them."""
    config, _ = parse_arguments(arguments_of("--batch_size", "7", "--max_retries", "-1"))
    assert config.batch.max_records == 7
    assert config.invoke.policy.max_retries == -1


def test_beam_s_options_are_let_through() -> None:
    """The runner and Beam's other options are known."""
    arguments = arguments_of("--runner=DirectRunner", "--streaming", "--job_name=j")
    assert parse_arguments(arguments)[1] == "DirectRunner"
    assert parse_arguments(arguments_of())[1] == "DirectRunner"
    assert parse_arguments(arguments_of("--runner", "FlinkRunner"))[1] == "FlinkRunner"


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        (["--topcis=a"], ["--topcis is not an option; did you mean --topics?"]),
        (["--topcis", "a"], ["--topcis is not an option; did you mean --topics?"]),
        (["--batch-size=5"], ["--batch-size is not an option; did you mean --batch_size?"]),
        (["--batch_siz=5"], ["--batch_siz is not an option; did you mean --batch_size?"]),
        (["--qqqqqq"], ["--qqqqqq is not an option; --help lists all"]),
        (["--password=s3cret"], ["--password is not an option; --help lists all"]),
        (["lost"], ["lost is not an option; --help lists all"]),
        (["--no_include_headers"], ["--no_include_headers is not an option"]),
        (["--a=1", "--b=2"], ["--a is not an option", "--b is not an option"]),
    ],
)
def test_an_option_nobody_knows_is_named(arguments: list[str], problems: list[str]) -> None:
    """A misspelt option is never passed over; its value is not shown."""
    with pytest.raises(UsageError) as raised:
        parse_arguments(arguments_of(*arguments))
    assert len(raised.value.problems) == len(problems)
    for problem, wanted in zip(raised.value.problems, problems):
        assert problem.startswith(wanted)
        assert "s3cret" not in problem


def test_unknown_options_are_reported_with_the_other_problems() -> None:
    """Misspelt names do not hide wrong values."""
    with pytest.raises(UsageError) as raised:
        parse_arguments(arguments_of("--topcis=a", "--batch_size=0"))
    assert len(raised.value.problems) == 2


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--topcis=a", "--batch_size=0"], ["--topcis", "--batch_size=0"]),
        (["--topics"], ["--topics: expected one argument"]),
        (["--runner"], ["--runner: expected one argument"]),
        (["--max_num_workers=abc"], ["--max_num_workers: invalid int value"]),
        (["--no_preflight=false"], ["--no_preflight"]),
        (["--runner=SparkRunner"], ["--runner=SparkRunner"]),
        (["--runner=FlinkRunner", "--workers=2"], ["--workers goes with the DirectRunner only"]),
        (
            ["--runner=FlinkRunner", "--delivery=exactly_once", "--response_topic=r"],
            ["--delivery=exactly_once goes with the DirectRunner only"],
        ),
        (
            ["--runner=FlinkRunner", "--start_paused", "--http=0", f"--http_token_file={TOKEN}"],
            ["--start_paused goes with the DirectRunner only"],
        ),
        (["--direct_num_workers=2"], ["--direct_num_workers=2 has no effect; use --workers"]),
        (["--kafka_config_file=/no/such/file"], ["--kafka_config_file=/no/such/file cannot"]),
    ],
)
def test_wrong_options_end_with_2_and_a_line_each(arguments, lines, capsys) -> None:
    """Nothing on stdout, no stack trace, one line per problem on stderr."""
    assert main(arguments_of(*arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == len(lines)
    for line, wanted in zip(err.splitlines(), lines):
        assert line.startswith(f"error: {wanted}")


def test_nothing_given_says_what_is_needed(capsys) -> None:
    """Without any option the four that are needed are named."""
    assert main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, ["kafka_bootstrap_servers", "consumer_group", "function"]):
        assert line.startswith(f"error: --{name} is missing; for example")
    assert "--topics" in lines[3]


def test_log_format_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It holds from there on, for what is wrong with the options too."""
    file = tmp_path / "options.yaml"
    file.write_text("log_format: json\nbatch_size: 0\n")
    assert main([f"--config={file}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(json.loads(line)["message"].startswith("error: ") for line in lines)
    assert main([f"--config={file}", "--log_format=text"]) == 2
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize(
    ("redirect", "code"), [(">&-", 0), ("> /dev/full", 0), ("| true", 0), (">&- --batch_size=0", 2)]
)
def test_nobody_takes_what_is_printed(redirect: str, code: int) -> None:
    """The exit code is that of the outcome, and there is no traceback."""
    command = [sys.executable, "-m", "pipeline", *arguments_of("--explain")]
    line = f"{shlex.join(command)} {redirect}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
