"""Flex Template: what Dataflow is told of the options, and what its README says of them. Pure."""

from __future__ import annotations

import json
import re
from typing import Any

from pipeline.options.declare import GROUPS, OF_TOPICS, OPTIONS, Group, Option

LEFT_OUT = {
    "config": "what a template is started with are parameters; `--explain` shows which they are",
    "explain": "nobody sees what the launcher prints",
    "expansion_service": "the image brings its own",
    "summary": "the launcher ends when the job begins, so there is nothing to sum up",
    "delivery": "streaming runners write at least once",
    "tumbling_window_secs": "windows are the DirectRunner's only",
    "workers": "they are Dataflow's",
    "max_workers": "they are Dataflow's",
    "rebalance_wait_secs": "a job's partitions move to no other member of a group",
    "log_format": "the log is Cloud Logging's",
    "log_level": "it is the launcher's; the workers' is Beam's default_sdk_harness_log_level",
    "http": "the launcher ends when the job begins, so nobody would answer",
    "http_token_file": "there is no http",
    "page_show": "there is no http",
    "metrics_partitions": "there is no http",
    "report": "the launcher ends when the job begins, so there is nothing to report",
    "start_paused": "a job is not told anything from outside",
}
"""Options that are no parameters of the template, and why."""

IMAGE = Group(
    "Dataflow",
    (
        Option(
            "sdk_container_image",
            "Image of the workers: the one the template was built with, since the launcher and "
            "the workers are the same. Required.",
            example="europe-west1-docker.pkg.dev/my-project/beam/beam-lambda-sink:0.1.0",
            pattern=r"\S+/\S+",
        ),
    ),
)
"""The one option of Beam's that has to be a parameter: nothing else tells workers their code."""

_TYPES = {"int": "NUMBER", "float": "NUMBER", "flag": "BOOLEAN", "choice": "ENUM"}
_TYPE_OF = {"filter_criteria": "GCS_READ_FILE"}

# Where a parameter can be less than an option.
_PATTERN_OF = {
    "filter_criteria": "gs://.+",
    # A file of the launching machine is none of the workers'; one in the image is.
    "kafka_config_file": "(gs://|secretmanager://|/).+",
}
_EXAMPLE_OF = {
    "filter_criteria": "gs://my-bucket/filters.json",
    "kafka_config_file": "secretmanager://projects/my-project/secrets/kafka/versions/latest",
    "lambda_endpoint_url": "https://vpce-0a1b-2c3d.lambda.eu-central-1.vpce.amazonaws.com",
    "kinesis_endpoint_url": "https://vpce-0a1b-2c3d.kinesis.eu-central-1.vpce.amazonaws.com",
    "dynamodb_endpoint_url": "https://vpce-0a1b-2c3d.dynamodb.eu-central-1.vpce.amazonaws.com",
}

_WORDS = {"arn": "ARN", "aws": "AWS", "url": "URL", "secs": "seconds", "kafka": "Kafka"}


def template_groups() -> list[Group]:
    """The options that are parameters, in their groups."""
    groups = []
    for group in (*GROUPS, IMAGE):
        kept = tuple(option for option in group.options if option.name not in LEFT_OUT)
        if kept:
            groups.append(Group(group.title, kept))
    return groups


def metadata() -> dict[str, Any]:
    """Of the whole template, as Dataflow's TemplateMetadata."""
    return {
        "name": "Kafka to AWS Lambda and back",
        "description": "Sends Kafka records to an AWS Lambda function in ordered batches, and "
        "writes its results and the records it could not handle to Kafka.",
        "streaming": True,
        "supportsAtLeastOnce": True,
        "supportsExactlyOnce": True,
        "defaultStreamingMode": "AT_LEAST_ONCE",
        "parameters": [
            parameter(option, group.title)
            for group in template_groups()
            for option in group.options
        ],
    }


def metadata_text() -> str:
    """The whole of metadata.json."""
    return json.dumps(metadata(), indent=2) + "\n"


def parameter(option: Option, group: str) -> dict[str, Any]:
    """One option, as Dataflow's ParameterMetadata."""
    made: dict[str, Any] = {
        "name": option.name,
        "label": _label(option.name),
        "helpText": help_text(option),
        "groupName": group,
        "paramType": _TYPE_OF.get(option.name) or _TYPES.get(option.kind, "TEXT"),
    }
    if not _is_required(option):
        made["isOptional"] = True
    if pattern := _pattern(option):
        made["regexes"] = [f"^({pattern})$"]
    if option.kind == "choice":
        made["enumOptions"] = [{"value": choice, "label": choice} for choice in option.choices]
    if option.default is not None:
        made["defaultValue"] = option.default_text
    return made


def _is_required(option: Option) -> bool:
    """Whether every launch needs it, whatever it reads."""
    return option.required and option.name not in OF_TOPICS


def _label(name: str) -> str:
    words = [_WORDS.get(word, word) for word in name.split("_")]
    return " ".join([words[0][0].upper() + words[0][1:], *words[1:]])


def help_text(option: Option) -> str:
    """The help in words of parameters, which have no dashes."""
    text = re.sub(r"--([a-z])", r"\1", option.help.removesuffix(" Required."))
    # Choices and switches show what they may be.
    shown = "" if option.kind in ("choice", "flag") else option.range
    facts = [shown and f"range: {shown}", option.unit and f"unit: {option.unit}"]
    known = "; ".join(fact for fact in facts if fact)
    return f"{text} ({known})" if known else text


def _pattern(option: Option) -> str:
    """What a value has to match as a whole; the program itself checks the rest."""
    if option.kind == "flag":
        return "true|false"
    if option.kind == "int":
        return r"-?\d+" if option.special else r"\d+"
    if option.kind == "float":
        return r"\d+(\.\d+)?"
    pattern = _PATTERN_OF.get(option.name) or option.pattern
    if option.kind == "list":
        one = f"({pattern or '|'.join(option.choices)})"
        return rf"{one}(\s*,\s*{one})*"
    return pattern


# -- its README ------------------------------------------------------------------------------------


def required_table() -> str:
    """The parameters that every launch has."""
    lines = ["| parameter | | for example |", "|---|---|---|"]
    for group in template_groups():
        lines += [
            f"| `{option.name}` | {_cell(option)} | `{option.example}` |"
            for option in group.options
            if _is_required(option)
        ]
    return "\n".join(lines)


def optional_table() -> str:
    """The others."""
    lines = ["| parameter | default | |", "|---|---|---|"]
    for group in template_groups():
        optional = [option for option in group.options if not _is_required(option)]
        if optional:
            lines.append(f"| **{group.title}** | | |")
        for option in optional:
            default = f"`{option.default_text}`" if option.default is not None else ""
            lines.append(f"| `{option.name}` | {default} | {_cell(option)} |")
    return "\n".join(lines)


def left_out_list() -> str:
    """Which options are no parameters."""
    return "\n".join(f"- `--{name}`: {LEFT_OUT[name]}" for name in OPTIONS if name in LEFT_OUT)


def _cell(option: Option) -> str:
    text = help_text(option).replace("|", "\\|")
    example = _EXAMPLE_OF.get(option.name, option.example)
    return f"{text} For example `{example}`." if example and not _is_required(option) else text
