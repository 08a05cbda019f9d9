"""JSON Schema: a schema -> a check of its records, whose JSON stays as it is. Pure."""

from __future__ import annotations

from typing import Any, NoReturn

import jsonschema_rs
import orjson

from transforms.json_text import loads
from transforms.records import PREFIX_BYTES
from transforms.schemas.json_dialect import resources, usable
from transforms.schemas.schema import Decode, DecodeError, SchemaText, all_references, explain, why


def json_decoder(schema: SchemaText) -> Decode:
    """A check of one schema's records; gives their JSON text as it is.

    Raises:
        DecodeError: The schema cannot be used.
    """
    try:
        contents = usable(orjson.loads(schema.text))
        references = {
            name: usable(orjson.loads(text.text)) for name, text in all_references(schema)
        }
        registry = jsonschema_rs.Registry(
            list(resources(contents, references).items()),
            draft=jsonschema_rs.Draft7,
            retriever=_refuse,
        )
        names_draft = isinstance(contents, dict) and "$schema" in contents
        make: Any = jsonschema_rs.validator_for if names_draft else jsonschema_rs.Draft7Validator
        validator = make(contents, registry=registry)
    except Exception as error:
        raise DecodeError(f"it is no JSON Schema that can be used: {explain(error)}") from None

    def decode(data: bytes) -> bytes:
        text = data[PREFIX_BYTES:]
        try:
            value = loads(text)
            if validator.is_valid(value):
                return text
            failed = next(iter(validator.iter_errors(value)))
        except Exception as error:
            raise DecodeError(why(error)) from None
        # Where in the schema, since the error's own text quotes the record.
        raise DecodeError(f"{'/'.join(map(str, failed.schema_path))} of the schema does not hold")

    return decode


def _refuse(address: str) -> NoReturn:
    """Nothing is fetched from addresses that a schema names."""
    raise ValueError(f"{address} is not among its references")
