"""JSON text -> its value: all that RFC 8259 calls JSON, also what a fast parser refuses. Pure.

orjson refuses half of a surrogate pair (`"\\ud83d"`, as a text that was cut through an emoji has
it) and numbers beyond those of 64 bits (`1e400`), which Python, JavaScript and Java write and read.
Refused stay a byte order mark and what is nested more than about 1000 deep.
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

import msgspec
import orjson

JSON_STARTS = frozenset(b'{["-0123456789tfn \t\r\n')
"""Bytes a JSON text can begin with; all else is text without asking the parser."""

# A text has one of these if it is JSON and orjson refuses it. To look for them is much less work
# than to ask a second parser about each text that is no JSON.
_BEYOND = re.compile(rb"\\u[dD][89a-fA-F]|[eE]\+?0*[1-9][0-9][0-9]|[0-9]{200}")

# Python turns text of up to 4300 digits into an integer.
_DIGITS = 4000


def loads(data: bytes) -> Any:
    """The value of a JSON text.

    A number beyond 64 bits is an integer, or infinity if it has more than 4000 digits. A string
    may hold half of a surrogate pair, so it need not be possible to encode it.

    Raises:
        ValueError: It is not JSON, or nested too deep.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        if not _BEYOND.search(data):
            raise
        try:
            return _DECODER.decode(data.decode())
        except RecursionError:
            raise ValueError("it is nested too deep") from None


_pass_over = msgspec.json.Decoder(msgspec.Raw).decode


def is_json(data: bytes) -> bool:
    """Whether `loads` would read it. A third of the price: nothing is made of it."""
    try:
        _pass_over(data)
    except (msgspec.DecodeError, RecursionError) as error:
        # It refuses half of a surrogate pair, and what is nested less deep than can be read.
        if isinstance(error, msgspec.DecodeError) and not _BEYOND.search(data):
            return False
        try:
            loads(data)
        except ValueError:
            return False
        return True
    return is_utf8(data)


def is_utf8(data: bytes) -> bool:
    """Whether it is text, which msgspec does not look at where nothing is made of it."""
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def no_constant(name: str) -> NoReturn:
    """For a JSON decoder: refuses NaN and its like."""
    raise ValueError(f"{name} is not JSON")


def integer(text: str) -> int | float:
    """For a JSON decoder: an integer of any size."""
    return int(text) if len(text) <= _DIGITS else _beyond(text)


def _float(text: str) -> int | float:
    number = float(text)
    return _beyond(text) if math.isinf(number) else number


def _beyond(text: str) -> int | float:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return float(text)  # an exponent of more than 18 digits
    return int(number) if number.adjusted() < _DIGITS else float(text)


_DECODER = json.JSONDecoder(parse_float=_float, parse_int=integer, parse_constant=no_constant)


def writable(text: str) -> str:
    """A string as it can be encoded: half of a surrogate pair becomes a question mark."""
    return text.encode(errors="replace").decode()
