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
from collections.abc import Callable, Iterable
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

from transforms.records import PREFIX_BYTES
from transforms.schemas.avro import double, single, unscaled
from transforms.schemas.schema import (
    CONNECT,
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

_MAIN = "0.proto"
_KNOWN_NAME = re.compile(r"[a-z0-9_]+(?:/[a-z0-9_]+)*\.proto")
_COMPILER_LOG = re.compile(r"WARNING: All log messages|[IW]\d{4} ")
_COMPILER_SECS = 60.0
_VARINT_BYTES = 5
_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)|(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')"""
    r"|\w+|.",
    re.DOTALL,
)


def protobuf_decoder(schema: SchemaText, style: str) -> Decode:
    """A decoder of one schema's messages.

    Args:
        schema: A Protobuf schema.
        style: ``connect`` or ``standard``.

    Raises:
        DecodeError: The schema cannot be used.
        ImportError: It is text, and the compiler that takes text is not installed.
    """
    pool, main, lenient = _load(schema)
    decoders: dict[tuple[int, ...], Callable[[bytes], Any]] = {}

    def decoder(path: tuple[int, ...]) -> Callable[[bytes], Any]:
        try:
            descriptor = pool.FindMessageTypeByName(_message_name(main, path))
        except (IndexError, KeyError):
            raise DecodeError("the schema has no message at its message indexes") from None
        parse = GetMessageClass(descriptor).FromString

        def message(data: bytes) -> Any:
            parsed = parse(data)
            if lenient:
                _check(parsed)
            return parsed

        if style != CONNECT:
            return lambda data: _standard(message(data), pool)
        convert = _Converters().of_root(descriptor)
        return lambda data: convert(message(data))

    def decode(data: bytes) -> bytes:
        path, start = message_indexes(data)
        if path not in decoders:
            decoders[path] = decoder(path)
        try:
            return orjson.dumps(decoders[path](data[start:]))
        except NoMessage:
            raise DecodeError("it is no message") from None
        except DecodeError:
            raise
        except Exception as error:
            raise DecodeError(why(error)) from None

    return decode


def _check(message: Any) -> None:
    """What the library lets pass in messages of proto2.

    Raises:
        DecodeError: A required field is missing, or a string is not UTF-8.
    """
    if not message.IsInitialized():
        raise DecodeError("a required field is missing")
    for field, value in message.ListFields():
        if field.message_type is None:
            if field.type == FieldDescriptor.TYPE_STRING:
                _check_texts(value if field.is_repeated else (value,))
        elif not field.is_repeated:
            _check(value)
        elif not field.message_type.GetOptions().map_entry:
            for item in value:
                _check(item)
        else:
            kinds = field.message_type.fields_by_name
            if kinds["key"].type == FieldDescriptor.TYPE_STRING:
                _check_texts(value)
            if kinds["value"].type == FieldDescriptor.TYPE_STRING:
                _check_texts(value.values())
            elif kinds["value"].message_type is not None:
                for item in value.values():
                    _check(item)


def _check_texts(values: Iterable[Any]) -> None:
    # The library hands out as bytes what is no text.
    if not all(isinstance(value, str) for value in values):
        raise DecodeError("a string is not UTF-8")


def _standard(message: Any, pool: DescriptorPool) -> Any:
    try:
        return json_format.MessageToDict(
            message, preserving_proto_field_name=True, descriptor_pool=pool
        )
    except TypeError:
        raise DecodeError("an Any holds a type that the schema does not have") from None
    except NoMessage:
        raise DecodeError("an Any holds what is no message of its type") from None
    except (ValueError, json_format.SerializeToJsonError):
        raise DecodeError("a value is outside what its type may have") from None


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
    for place, byte in enumerate(data[at : at + _VARINT_BYTES], at):
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return (number >> 1) ^ -(number & 1), place + 1
    if len(data) - at >= _VARINT_BYTES:
        raise DecodeError("its message indexes are no numbers of 32 bits")
    raise DecodeError("its message indexes are cut off")


# The schema


def _load(schema: SchemaText) -> tuple[DescriptorPool, FileDescriptorProto, bool]:
    """A pool with the schema and all it imports, the schema's own file, and whether any is lenient.

    Only proto3 has its strings checked by the library, and no required fields.

    Names that the registry hands out stay in texts: the files have numbers for names, so that
    nothing from outside is an argument of the compiler or a place on the disk.
    """
    references = dict(all_references(schema))
    numbered = {name: f"{number}.proto" for number, name in enumerate(references, 1)}
    texts = [*((numbered[name], text) for name, text in references.items()), (_MAIN, schema)]
    files: dict[str, FileDescriptorProto] = {}
    known: dict[str, FileDescriptorProto] = {}
    sources: dict[str, str] = {}

    def imported(name: str) -> str:
        if _add_known(name, known):
            return name
        if name not in numbered:
            raise ValueError(f"it imports {name}, which is not among its references")
        return numbered[name]

    try:
        for name, text in texts:
            file = _decoded(text.text)
            if file is None:
                sources[name] = _with_imports(text.text, imported)
            else:
                file.name = name
                file.dependency[:] = map(imported, file.dependency)
                files[name] = file
        if sources:
            shown = {_MAIN: "the schema", **{file: name for name, file in numbered.items()}}
            files |= _compile(sources, [*known.values(), *files.values()], shown)
        pool = DescriptorPool()
        for file in (*known.values(), *(files[name] for name, _ in texts)):
            pool.Add(file)
    except ImportError:
        raise
    except Exception as error:
        raise DecodeError(f"it is no Protobuf schema that can be used: {explain(error)}") from None
    return pool, files[_MAIN], any(file.syntax != "proto3" for file in files.values())


def _with_imports(text: str, imported: Callable[[str], str]) -> str:
    """A schema's text with other names in its import statements.

    Args:
        text: The schema.
        imported: The new name of an import.
    """
    parts: list[str] = []
    statement: list[str] = []
    for token in _TOKEN.finditer(text):
        part = token[0]
        if token["string"] and statement and statement[0] == "import":
            part = f'"{imported(part[1:-1])}"'
        if not token["space"]:
            statement = [] if part in ";{}" else [*statement, part][:2]
        parts.append(part)
    return "".join(parts)


def _decoded(text: str) -> FileDescriptorProto | None:
    """The file of a schema that is a descriptor in base64; None if it is text."""
    try:
        encoded = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return FileDescriptorProto.FromString(encoded)


def _add_known(name: str, known: dict[str, FileDescriptorProto]) -> bool:
    """Add a file that schemas import without saying where it is, after what it imports itself.

    Returns:
        Whether it is such a file.
    """
    if name in known:
        return True
    for prefix, package in _KNOWN.items():
        if name.startswith(prefix) and _KNOWN_NAME.fullmatch(name):
            module = name[len(prefix) :].removesuffix(".proto").replace("/", ".") + "_pb2"
            with contextlib.suppress(ImportError):
                descriptor = importlib.import_module(package + module).DESCRIPTOR
                for needed in descriptor.dependencies:
                    _add_known(needed.name, known)
                known[name] = FileDescriptorProto.FromString(descriptor.serialized_pb)
                return True
    return False


def _compile(
    sources: dict[str, str], others: list[FileDescriptorProto], shown: dict[str, str]
) -> dict[str, FileDescriptorProto]:
    """The files of schemas that the registry hands out as text.

    Args:
        sources: By the name of ours for a file, its text.
        others: What they import that is compiled already.
        shown: By the name of ours, the schema's own name, for messages.

    Raises:
        ImportError: The compiler is not installed.
        ValueError: What the compiler says.
    """
    if importlib.util.find_spec("grpc_tools") is None:
        raise ImportError("grpc_tools")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        (folder / "in").mkdir()
        for name, text in sources.items():
            (folder / "in" / name).write_text(text, encoding="utf-8")
        (folder / "others").write_bytes(FileDescriptorSet(file=others).SerializeToString())
        command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={folder / 'in'}"]
        options = [
            f"--descriptor_set_in={folder / 'others'}",
            f"--descriptor_set_out={folder / 'out'}",
        ]
        # A process of its own: what it says is ours to say, and it may crash without us.
        try:
            done = subprocess.run(
                [*command, *options, *sources],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=_COMPILER_SECS,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"to compile it takes over {_COMPILER_SECS:.0f} s") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if not _COMPILER_LOG.match(line)]
            said = "; ".join(lines).replace(f"{folder / 'in'}/", "")
            raise ValueError(re.sub(r"\d+\.proto\b", lambda m: shown.get(m[0], m[0]), said))
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
