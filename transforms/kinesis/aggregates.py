"""Aggregates: records that the Kinesis Producer Library has put into one. Pure.

Such a record is a magic number, a Protobuf message, and its MD5. Anything else is a record like any
other; so is what says that it is an aggregate and cannot be read to its end.
"""

from __future__ import annotations

from hashlib import md5
from typing import Any, NamedTuple

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from transforms.names import SUB_BITS

MAGIC = b"\xf3\x89\x9a\xc2"
_DIGEST = 16
_MOST = (1 << SUB_BITS) - 1
_HASHES = 2**128


class Part(NamedTuple):
    """A record of an aggregate.

    Attributes:
        key: Its partition key, UTF-8.
        data: Its data.
        hash_key: The hash key that it was given in place of its partition key's; None without.
    """

    key: bytes
    data: bytes
    hash_key: int | None


def _message() -> Any:
    """The class of the message, in a pool of its own."""
    bytes_, number = FieldDescriptorProto.TYPE_BYTES, FieldDescriptorProto.TYPE_UINT64
    inner = FieldDescriptorProto.TYPE_MESSAGE
    one, must, many = (
        FieldDescriptorProto.LABEL_OPTIONAL,
        FieldDescriptorProto.LABEL_REQUIRED,
        FieldDescriptorProto.LABEL_REPEATED,
    )
    file = FileDescriptorProto(name="aggregated.proto", package="aggregated", syntax="proto2")
    record = file.message_type.add(name="Record")
    record.field.add(name="key", number=1, type=number, label=must)
    record.field.add(name="hash_key", number=2, type=number, label=one)
    record.field.add(name="data", number=3, type=bytes_, label=must)
    whole = file.message_type.add(name="Whole")
    whole.field.add(name="keys", number=1, type=bytes_, label=many)
    whole.field.add(name="hash_keys", number=2, type=bytes_, label=many)
    whole.field.add(
        name="records", number=3, type=inner, label=many, type_name=".aggregated.Record"
    )
    pool = DescriptorPool()
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName("aggregated.Whole"))


_Whole = _message()


def take_apart(data: bytes) -> list[Part] | None:
    """The records of an aggregate, in order; None if it is none, or cannot be read, or is empty."""
    if not data.startswith(MAGIC) or len(data) < len(MAGIC) + _DIGEST:
        return None
    body = data[len(MAGIC) : -_DIGEST]
    if md5(body, usedforsecurity=False).digest() != data[-_DIGEST:]:
        return None
    try:
        whole: Message = _Whole.FromString(body)
        return _parts(whole)
    except (DecodeError, ValueError, IndexError):
        return None


def _parts(whole: Any) -> list[Part] | None:
    if not whole.IsInitialized():
        return None
    keys: list[bytes] = list(whole.keys)
    for key in keys:
        key.decode()
    hash_keys = [_hash_key(each) for each in whole.hash_keys]
    records = whole.records
    if not 0 < len(records) < _MOST:
        return None
    if hash_keys:
        return [
            Part(
                keys[each.key],
                each.data,
                hash_keys[each.hash_key] if each.HasField("hash_key") else None,
            )
            for each in records
        ]
    if any(each.HasField("hash_key") for each in records):
        return None
    return [Part(keys[each.key], each.data, None) for each in records]


def _hash_key(text: bytes) -> int:
    if not text.isdigit() or len(text) > 39 or int(text) >= _HASHES:
        raise ValueError("it is no hash key")
    return int(text)


def foreign(parts: list[Part], low: int, high: int) -> int:
    """How many of an aggregate's records do not belong into a range of hash keys: their shard was
    split or merged while they were on their way."""
    found: dict[bytes, int] = {}
    count = 0
    for key, _, given in parts:
        if given is None:
            if key not in found:
                found[key] = int.from_bytes(md5(key, usedforsecurity=False).digest(), "big")
            given = found[key]
        count += not low <= given <= high
    return count
