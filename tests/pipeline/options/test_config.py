"""Config: defaults, where each option lands, and what follows from others."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.options.declare import OPTIONS
from tests.pipeline.options.given import BESIDE, CASES, LANDING, REGISTRY, config_of, problems_of
from transforms.errors import UsageError


def test_every_option_has_its_case_here() -> None:
    """A new option has to come with its default, its effect and its place in the config."""
    assert list(CASES) == list(LANDING)


@pytest.mark.parametrize("name", list(CASES))
def test_each_option_s_default(name: str) -> None:
    """An option that is not given has its documented default."""
    find, default, _, _ = CASES[name]
    assert find(config_of()) == default


@pytest.mark.parametrize("name", list(CASES))
def test_each_option_lands_where_it_is_used(name: str) -> None:
    """An option's value arrives at its step, and so changes what the pipeline does."""
    find, default, text, expected = CASES[name]
    assert expected != default
    assert find(config_of(**{**BESIDE.get(name, {}), name: text})) == expected


def test_the_registry_for_what_is_written_only() -> None:
    """NONE decodes nothing; the schemas of the outputs still have their registry."""
    config = config_of(schema_registry_url=REGISTRY, schema_validation="NONE")
    assert config.decode is None
    assert config.write.registry and config.write.registry.url == REGISTRY
    assert config_of().write.registry is None


def test_the_function_s_name_is_in_error_records() -> None:
    """The write step knows the function and the cluster too."""
    config = config_of(function="orders:live")
    assert config.write.function == "orders:live"
    assert config.write.kafka == config.read.source.kafka == config.kafka


@pytest.mark.parametrize("text", ["1969-12-31T23:59:59.999Z", "1960-01-01"])
def test_a_time_before_kafka_s_first_is_its_first(text: str) -> None:
    """Numbers below 0 mean something else to Kafka, so no time comes to one."""
    config = config_of(starting_position="AT_TIMESTAMP", starting_timestamp=text)
    assert config.source.starting_timestamp_ms == 0


@pytest.mark.parametrize(("kind", "limit"), [("sync", 6_291_455), ("async", 1_048_576)])
def test_the_payload_limit_is_the_invocation_type_s(kind: str, limit: int) -> None:
    """Without --batch_bytes it is Lambda's own limit."""
    config = config_of(invocation_type=kind)
    assert config.batch.max_bytes == config.read.batch_bytes == limit


def test_base64_is_due_earlier() -> None:
    """Four bytes of payload are three bytes read: waiting for more would only wait."""
    config = config_of(envelope="kafka_event", batch_bytes="1000")
    assert (config.batch.max_bytes, config.read.batch_bytes) == (1000, 750)


def test_the_event_shows_the_brokers_as_they_were_given() -> None:
    """The function sees what its configuration says, as with AWS."""
    config = config_of(envelope="kafka_event", kafka_bootstrap_servers="a:1,b:2")
    assert config.batch.format.envelope.bootstrap_servers == "a:1,b:2"


@pytest.mark.parametrize(
    ("given", "reply", "log_tail"),
    [
        ({}, "none", False),
        ({"response_topic": "r"}, "confluent", False),
        ({"response_topic": "r", "envelope": "kafka_event"}, "any", False),
        ({"response_topic": "r", "envelope": "pipes"}, "any", False),
        ({"response_topic": "r", "envelope": "pipes", "reply": "confluent"}, "confluent", False),
        ({"response_topic": "r", "reply": "any"}, "any", False),
        ({"reply": "confluent"}, "confluent", False),
        ({"envelope": "kafka_event"}, "none", False),
        ({"on_error": "log", "error_topic": "e"}, "none", True),
        ({"on_error": "log"}, "none", False),
        ({"on_error": "fail", "error_topic": "e"}, "none", False),
        ({"on_error": "log", "error_topic": "e", "invocation_type": "async"}, "none", False),
        ({"invocation_type": "async", "reply": "none"}, "none", False),
    ],
)
def test_what_is_asked_of_the_function_follows_from_the_outputs(
    given: dict, reply: str, log_tail: bool
) -> None:
    """Replies are checked and logs fetched only where somebody gets them."""
    config = config_of(**given)
    assert config.invoke.reply == reply
    assert config.invoke.function.log_tail is log_tail


@pytest.mark.parametrize(("kind", "told"), [("sync", True), ("async", False)])
def test_only_a_sync_invocation_has_a_context(kind: str, told: bool) -> None:
    """Lambda drops it from an event that it queues."""
    assert config_of(invocation_type=kind).invoke.client_context is told


@pytest.mark.parametrize("on_error", ["fail", "log", "ignore"])
def test_only_fail_halts(on_error: str) -> None:
    """log and ignore go on with the next batch."""
    assert config_of(on_error=on_error).invoke.policy.halt is (on_error == "fail")


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("", 1_000_000),
        ("message.max.bytes=2000", 2000),
        ("error.message.max.bytes=3000", 3000),
        ("message.max.bytes=2000\nerror.message.max.bytes=3000", 3000),
        ("response.message.max.bytes=4000", 1_000_000),
        ("error.message.max.bytes=many", 1_000_000),
    ],
)
def test_error_records_stay_below_what_their_producer_takes(
    tmp_path: Path, text: str, limit: int
) -> None:
    """The properties file's limit for messages is the one that error records are divided by."""
    file = tmp_path / "kafka.properties"
    file.write_text(text)
    assert config_of(kafka_config_file=str(file)).write.max_error_bytes == limit


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    """One run is enough to learn everything that has to be mended."""
    file = tmp_path / "kafka.properties"
    file.write_text("acks=0\nnonsense\n")
    problems = problems_of(
        consumer_group=None,
        topics=None,
        batch_size="0",
        batch_window_secs="soon",
        on_error="panic",
        include_headers="maybe",
        function="f f",
        starting_timestamp="yesterday",
        kafka_config_file=str(file),
    )
    wanted = [
        "--consumer_group is missing",
        "exactly one of --topics",
        "--batch_size=0",
        "--batch_window_secs=soon",
        "--on_error=panic",
        "--include_headers=maybe",
        "--function=f f",
        "--starting_timestamp goes with",
        "--starting_timestamp=yesterday",
        "acks",
        "line 2",
    ]
    assert len(problems) == len(wanted)
    for part in wanted:
        assert sum(part in problem for problem in problems) == 1


@given(st.dictionaries(st.sampled_from(list(OPTIONS)), st.none() | st.text(max_size=12)))
@settings(deadline=None)
def test_any_text_is_taken_or_refused_with_reasons(given: dict) -> None:
    """Whatever is typed, the answer is a config or a list of problems."""
    try:
        config_of(**given)
    except UsageError as error:
        assert error.problems
        assert error.exit_code == 2
