"""Spread: a salt in a key, by which Flink deals keys out evenly. Pure.

Flink gives a key to a subtask by a hash of its bytes. That is even for many keys and not for few:
of four partitions on two subtasks, one gets three or all four in five cases of eight. So a key has
a salt in it, the first number with which its hash is the one that is wanted for it.

The hash decides on one of 128 key groups, and each subtask has some that are next to each other.
So keys that follow on each other get groups that are far apart: by van der Corput's sequence, of
which any stretch is about even. With more than 85 subtasks Flink has more groups, and it is as if
there were no salt. Other runners see a key like any other.

What the salt of a key is stays for good: state is kept under the whole key.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

GROUPS = 128
"""Key groups of a job of Flink's, unless it has more than 85 subtasks."""

_BITS = GROUPS.bit_length() - 1
_FAR_APART = [int(f"{place:0{_BITS}b}"[::-1], 2) for place in range(GROUPS)]
# One in 128 fits, so 4,000 do not in one case of 10^13.
_MOST = 4000
_32_BITS, _64_BITS = 2**32 - 1, 2**64 - 1
# Of MurmurHash3.
_FIRST, _SECOND = 0x87C37B91114253D5, 0x4CF5AD432745937F


def place_of(topic: str, partition: int, lane: int = 0) -> int:
    """The place of a key among those that follow on each other; each topic begins elsewhere."""
    return zlib.crc32(topic.encode()) + partition + lane


def salt_of(make: Callable[[int], bytes], place: int) -> int:
    """The salt for a key.

    Args:
        make: The key's bytes with a salt in it, as Beam's runner has them: of a coder that it
            does not know, behind their length.
        place: See `place_of`.
    """
    wanted = _FAR_APART[place % GROUPS]
    fitting = (number for number in range(_MOST) if key_group(make(number)) == wanted)
    return next(fitting, 0)


def key_group(key: bytes) -> int:
    """The key group that Flink finds for a key."""
    return _murmur(_hash(key)) % GROUPS


def _hash(data: bytes) -> int:
    """As Beam's runner has it: the first 32 bits of MurmurHash3 of 128 bits, the 64-bit form."""
    first = second = 0
    whole = len(data) // 16 * 16
    for at in range(0, whole, 16):
        first ^= _first_mixed(int.from_bytes(data[at : at + 8], "little"))
        first = (_rotated(first, 27, 64) + second) * 5 + 0x52DCE729 & _64_BITS
        second ^= _second_mixed(int.from_bytes(data[at + 8 : at + 16], "little"))
        second = (_rotated(second, 31, 64) + first) * 5 + 0x38495AB5 & _64_BITS
    first ^= _first_mixed(int.from_bytes(data[whole : whole + 8], "little")) ^ len(data)
    second ^= _second_mixed(int.from_bytes(data[whole + 8 :], "little")) ^ len(data)
    first = first + second & _64_BITS
    second = second + first & _64_BITS
    return _finished(first) + _finished(second) & _32_BITS


def _first_mixed(block: int) -> int:
    return _rotated(block * _FIRST & _64_BITS, 31, 64) * _SECOND & _64_BITS


def _second_mixed(block: int) -> int:
    return _rotated(block * _SECOND & _64_BITS, 33, 64) * _FIRST & _64_BITS


def _finished(code: int) -> int:
    code = (code ^ code >> 33) * 0xFF51AFD7ED558CCD & _64_BITS
    code = (code ^ code >> 33) * 0xC4CEB9FE1A85EC53 & _64_BITS
    return code ^ code >> 33


def _murmur(code: int) -> int:
    """What Flink makes of a hash: MurmurHash3 of its four bytes, without its sign."""
    code = code * 0xCC9E2D51 & _32_BITS
    code = _rotated(code, 15, 32) * 0x1B873593 & _32_BITS
    code = _rotated(code, 13, 32) * 5 + 0xE6546B64 & _32_BITS
    code ^= 4
    code = (code ^ code >> 16) * 0x85EBCA6B & _32_BITS
    code = (code ^ code >> 13) * 0xC2B2AE35 & _32_BITS
    code ^= code >> 16
    if code < 2**31:
        return code
    # Of the one that has no counterpart, Flink makes 0.
    return (2**32 - code) % 2**31


def _rotated(code: int, by: int, bits: int) -> int:
    return (code << by | code >> bits - by) & ((1 << bits) - 1)
