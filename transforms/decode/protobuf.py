"""Protobuf: a schema -> a decoder of its messages to JSON. Pure.

``connect`` is the JSON of Connect's JsonConverter for what its ProtobufConverter makes of a
message, ``standard`` is Protobuf's own JSON with the field names of the schema.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date, time
from pathlib import Path
from typing import Any, TypeAlias

import orjson
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor, OneofDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError as NoMessage
from google.protobuf.message_factory import GetMessageClass

from transforms.decode.avro import double, single, unscaled
from transforms.decode.schemas import (
    CONNECT,
    PREFIX_BYTES,
    Decode,
    DecodeError,
    SchemaText,
    all_references,
    explain,
    why,
)

_Convert: TypeAlias = Callable[[Any], Any]

_KNOWN = {
    "google/protobuf/": "google.protobuf.",
    "google/type/": "google.type.",
    "confluent/": "confluent_kafka.schema_registry.confluent.",
}
"""Files that every registry takes for known, and the package that has them here."""

_MAIN = "beam-lambda-sink.proto"
_COMPILER_LOG = re.compile(r"WARNING: All log messages|[IW]\d{4} ")
_IMPORT = re.compile(r'\bimport\s+(?:public\s+|weak\s+)?"([^"]+)"')


def protobuf_decoder(schema: SchemaText, style: str) -> Decode:
    """A decoder of one schema's messages.

    Args:
        schema: A Protobuf schema.
        style: ``connect`` or ``standard``.

    Raises:
        DecodeError: The schema cannot be used.
        ImportError: It is text, and the compiler that takes text is not installed.
    """
    pool, main = _load(schema)
    decoders: dict[tuple[int, ...], Callable[[bytes], Any]] = {}

    def decoder(path: tuple[int, ...]) -> Callable[[bytes], Any]:
        try:
            descriptor = pool.FindMessageTypeByName(_message_name(main, path))
        except (IndexError, KeyError):
            raise DecodeError("the schema has no message at its message indexes") from None
        parse = GetMessageClass(descriptor).FromString
        if style != CONNECT:
            return lambda data: json_format.MessageToDict(
                parse(data), preserving_proto_field_name=True, descriptor_pool=pool
            )
        convert = _Converters().of_root(descriptor)
        return lambda data: convert(parse(data))

    def decode(data: bytes) -> bytes:
        path, start = message_indexes(data)
        if path not in decoders:
            decoders[path] = decoder(path)
        try:
            return orjson.dumps(decoders[path](data[start:]))
        except NoMessage:
            raise DecodeError("it is no message") from None
        except Exception as error:
            raise DecodeError(why(error)) from None

    return decode


def message_indexes(data: bytes) -> tuple[tuple[int, ...], int]:
    """Which message of its schema a record is, and where the message begins.

    Returns:
        The index among the schema's messages, then among that message's own, and so on; and the
        place behind them.

    Raises:
        DecodeError: The record ends before, or has a number that is no index.
    """
    count, at = _varint(data, PREFIX_BYTES)
    if not count:
        return (0,), at
    if not 0 < count <= len(data) - at:
        raise DecodeError("its message indexes are none")
    path = []
    for _ in range(count):
        index, at = _varint(data, at)
        if index < 0:
            raise DecodeError("its message indexes are none")
        path.append(index)
    return tuple(path), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A zigzag number, and the place behind it."""
    number = shift = 0
    for place, byte in enumerate(data[at : at + 5], at):
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return (number >> 1) ^ -(number & 1), place + 1
    raise DecodeError("its message indexes are cut off")


# The schema


def _load(schema: SchemaText) -> tuple[DescriptorPool, FileDescriptorProto]:
    """A pool with the schema and all it imports, and the schema's own file."""
    texts = {**dict(all_references(schema)), _MAIN: schema}
    files: dict[str, FileDescriptorProto] = {}
    known: dict[str, FileDescriptorProto] = {}
    sources: dict[str, str] = {}
    try:
        for name, text in texts.items():
            file = _decoded(name, text.text)
            if file is None:
                sources[name] = text.text
            else:
                files[name] = file
            for needed in _IMPORT.findall(text.text) if file is None else file.dependency:
                if needed not in texts:
                    _add_known(needed, known)
        if sources:
            files |= _compile(sources, [*known.values(), *files.values()])
        pool = DescriptorPool()
        for file in (*known.values(), *(files[name] for name in texts)):
            pool.Add(file)
    except ImportError:
        raise
    except Exception as error:
        raise DecodeError(f"it is no Protobuf schema that can be used: {explain(error)}") from None
    return pool, files[_MAIN]


def _decoded(name: str, text: str) -> FileDescriptorProto | None:
    """The file of a schema that is a descriptor in base64; None if it is text."""
    try:
        encoded = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    file = FileDescriptorProto.FromString(encoded)
    file.name = name
    return file


def _add_known(name: str, known: dict[str, FileDescriptorProto]) -> None:
    """Add a file that schemas import without saying where it is, after what it imports itself."""
    if name in known:
        return
    for prefix, package in _KNOWN.items():
        if name.startswith(prefix):
            module = name[len(prefix) :].removesuffix(".proto").replace("/", ".") + "_pb2"
            with contextlib.suppress(ImportError):
                descriptor = importlib.import_module(package + module).DESCRIPTOR
                for needed in descriptor.dependencies:
                    _add_known(needed.name, known)
                known[name] = FileDescriptorProto.FromString(descriptor.serialized_pb)
                return
    raise ValueError(f"it imports {name}, which is not among its references")


def _compile(
    sources: dict[str, str], others: list[FileDescriptorProto]
) -> dict[str, FileDescriptorProto]:
    """The files of schemas that the registry hands out as text.

    Raises:
        ImportError: The compiler is not installed.
        ValueError: What the compiler says.
    """
    if importlib.util.find_spec("grpc_tools") is None:
        raise ImportError("grpc_tools")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        for name, text in sources.items():
            target = (folder / "in" / name).resolve()
            if not target.is_relative_to(folder / "in"):
                raise ValueError(f"it imports {name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        (folder / "others").write_bytes(FileDescriptorSet(file=others).SerializeToString())
        command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={folder / 'in'}"]
        options = [
            f"--descriptor_set_in={folder / 'others'}",
            f"--descriptor_set_out={folder / 'out'}",
        ]
        # A process of its own: what it says is ours to say, and it may crash without us.
        done = subprocess.run(
            [*command, *options, *sources], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if not _COMPILER_LOG.match(line)]
            raise ValueError("; ".join(lines).replace(f"{folder / 'in'}/", ""))
        compiled = FileDescriptorSet.FromString((folder / "out").read_bytes())
    return {file.name: file for file in compiled.file}


def _message_name(file: FileDescriptorProto, path: tuple[int, ...]) -> str:
    """Full name of the message at the indexes.

    Raises:
        IndexError: There is none.
    """
    message = file.message_type[path[0]]
    names = [message.name]
    for index in path[1:]:
        message = message.nested_type[index]
        names.append(message.name)
    return ".".join([file.package, *names] if file.package else names)


# Messages as Connect has them


class _Converters:
    """Makes functions from messages to what orjson writes as Connect's JSON."""

    def __init__(self) -> None:
        self._structs: dict[str, _Convert] = {}

    def of_root(self, descriptor: Descriptor) -> _Convert:
        """For a whole record: a wrapper message is the value that it wraps."""
        if descriptor.full_name in _WRAPPERS:
            convert = self._of_value(descriptor.fields_by_name["value"])
            return lambda message: convert(message.value)
        return self._of_message(descriptor)

    def _of_message(self, descriptor: Descriptor) -> _Convert:
        name = descriptor.full_name
        if name in _LOGICAL:
            return _LOGICAL[name]
        if name not in self._structs:
            # Known before it is made, since a message may hold others of its own kind.
            self._structs[name] = lambda message: made(message)
            self._structs[name] = made = self._make_struct(descriptor)
        return self._structs[name]

    def _make_struct(self, descriptor: Descriptor) -> _Convert:
        unions = [oneof for oneof in descriptor.oneofs if not _is_synthetic(oneof)]
        oneofs = [
            (
                f"{oneof.name}_{oneof.index}",
                oneof.name,
                {field.name: self._of_field(field) for field in oneof.fields},
            )
            for oneof in unions
        ]
        fields = [
            (field.name, field.has_presence, self._of_field(field))
            for field in descriptor.fields
            if field.containing_oneof is None or _is_synthetic(field.containing_oneof)
        ]

        def convert(message: Any) -> dict[str, Any]:
            struct: dict[str, Any] = {}
            for name, oneof, members in oneofs:
                chosen = message.WhichOneof(oneof)
                struct[name] = chosen and {
                    member: convert(getattr(message, member)) if member == chosen else None
                    for member, convert in members.items()
                }
            for name, may_be_unset, convert in fields:
                if may_be_unset and not message.HasField(name):
                    struct[name] = None
                else:
                    struct[name] = convert(getattr(message, name))
            return struct

        return convert

    def _of_field(self, field: FieldDescriptor) -> _Convert:
        if not field.is_repeated:
            return self._of_value(field)
        if field.message_type is None or not field.message_type.GetOptions().map_entry:
            convert = self._of_value(field)
            return lambda values: [convert(value) for value in values]
        key = field.message_type.fields_by_name["key"]
        convert = self._of_value(field.message_type.fields_by_name["value"])
        if key.type == FieldDescriptor.TYPE_STRING:
            return lambda map: {key: convert(map[key]) for key in sorted(map)}
        return lambda map: [[key, convert(map[key])] for key in sorted(map)]

    def _of_value(self, field: FieldDescriptor) -> _Convert:
        if field.message_type is not None:
            return self._of_message(field.message_type)
        if field.enum_type is not None:
            names = {value.number: value.name for value in reversed(field.enum_type.values)}
            unknown = f"UNKNOWN_ENUM_VALUE_{field.enum_type.name}_"
            return lambda number: names.get(number) or f"{unknown}{number}"
        return _SCALARS.get(field.type, _as_it_is)


def _as_it_is(value: Any) -> Any:
    return value


def _timestamp(message: Any) -> int:
    if not 0 <= message.nanos < 1_000_000_000:
        raise ValueError("nanos")
    return int(message.seconds * 1000 + message.nanos // 1_000_000)


def _date(message: Any) -> int:
    return date(message.year, message.month, message.day).toordinal() - _EPOCH_DAY


def _time_of_day(message: Any) -> int:
    moment = time(message.hours, message.minutes, message.seconds, message.nanos // 1000)
    seconds = (moment.hour * 60 + moment.minute) * 60 + moment.second
    return seconds * 1000 + moment.microsecond // 1000


def _decimal(message: Any) -> str:
    return unscaled(message.value)


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _is_synthetic(oneof: OneofDescriptor) -> bool:
    """Whether it only says that a single field is optional."""
    return len(oneof.fields) == 1 and oneof.name == f"_{oneof.fields[0].name}"


_EPOCH_DAY = date(1970, 1, 1).toordinal()

_SCALARS: dict[int, _Convert] = {
    FieldDescriptor.TYPE_FLOAT: single,
    FieldDescriptor.TYPE_DOUBLE: double,
    FieldDescriptor.TYPE_BYTES: _base64,
}
_LOGICAL: dict[str, _Convert] = {
    "google.protobuf.Timestamp": _timestamp,
    "google.type.Date": _date,
    "google.type.TimeOfDay": _time_of_day,
    "confluent.type.Decimal": _decimal,
}
_WRAPPERS = frozenset(
    f"google.protobuf.{kind}Value"
    for kind in ("Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes")
)
