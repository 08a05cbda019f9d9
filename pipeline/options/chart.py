"""Chart: what Helm is told of the options, so that it refuses what the program would. Pure."""

from __future__ import annotations

import json
from typing import Any

from pipeline.options.declare import OF_TOPICS, OPTIONS, Option

LEFT_OUT = {
    "config": "options are given by their names",
    "explain": "the program would end at once, again and again",
    "until": "a Deployment goes on for ever",
    "kafka_reader": "it is for Flink and Dataflow",
    "expansion_service": "it is for Flink and Dataflow",
    "kafka_config_file": "kafkaProperties and existingKafkaSecret make it",
    "http": "the value of that name makes it",
    "http_token_file": "http.tokenSecret makes it",
}
"""Options that are not among the chart's, and why."""

_TYPES = {"int": "integer", "float": "number", "flag": "boolean"}


def options_schema() -> dict[str, Any]:
    """JSON schema of the options by their names."""
    options = [option for option in OPTIONS.values() if option.name not in LEFT_OUT]
    needed = [option.name for option in options if option.required]
    return {
        "description": "Options of the program by their names: docs/options.md.",
        "type": "object",
        "additionalProperties": False,
        "required": [name for name in needed if name not in OF_TOPICS],
        "oneOf": [
            {"required": ["topics", *OF_TOPICS]},
            {"required": ["topics_regex", *OF_TOPICS]},
            {"required": ["stream", "lease_table"]},
        ],
        "properties": {option.name: _schema(option) for option in options},
    }


def _schema(option: Option) -> dict[str, Any]:
    made: dict[str, Any] = {"description": option.help}
    if option.kind == "choice":
        return made | {"enum": list(option.choices)}
    if option.kind == "list":
        item = {"type": "string"} | _pattern(option)
        return made | {"anyOf": [{"type": "string"}, {"type": "array", "items": item}]}
    if option.kind == "text":
        return made | {"type": "string"} | _pattern(option)
    made["type"] = _TYPES[option.kind]
    bounds = {"minimum": option.low, "maximum": option.high}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    if option.special:
        return made | {"anyOf": [{"const": option.special[0]}, bounds]}
    return made | bounds


def _pattern(option: Option) -> dict[str, str]:
    return {"pattern": f"^({option.pattern})$"} if option.pattern else {}


def with_options(text: str) -> str:
    """A chart's values.schema.json with the options as they are."""
    schema = json.loads(text)
    schema["properties"]["config"] = options_schema()
    return json.dumps(schema, indent=2) + "\n"
