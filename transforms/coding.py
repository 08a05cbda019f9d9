"""Coding: how the values that travel between the steps become bytes.

In a streaming run, what crosses between workers or stays in state are bytes of forms of our own:
`transforms.columns` for records, `transforms.facts` for the rest, by a `FactsCoder` where a runner
has to know the coder. So a job can go on with another version of the program.

Within a process they are pickled where Beam insists, as their columns are C's to pickle, a thousand
records in one go. What Beam's own pickling coder lacks is a cheap answer to how large an element
is: Beam asks for that at each step, of the first elements of each bundle and of some later ones,
and would have each of them pickled for it.
"""

from __future__ import annotations

import pickle
from abc import abstractmethod
from typing import Any

from apache_beam import coders
from apache_beam.coders import coder_impl

from transforms.facts import unversioned, versioned
from transforms.records import Batch, Finished, Progress, RecordChunk, Responses

# What an element has besides keys, values and entries; the size is an estimate anyway.
_RECORD_BYTES = 20
_ELEMENT_BYTES = 200


def estimated_bytes(element: RecordChunk | Batch | Finished | Progress) -> int:
    """About how large an element is when it is pickled. Pure."""
    if isinstance(element, RecordChunk):
        values = sum(map(len, filter(None, element.records.values)))
        return _ELEMENT_BYTES + values + _RECORD_BYTES * len(element.records)
    if isinstance(element, Batch):
        # Its records are in it too, as Kafka had them, and what is around them in an entry is not.
        return _ELEMENT_BYTES + 2 * element.payload_bytes
    if isinstance(element, Finished):
        size = _ELEMENT_BYTES
        for part in element.parts:
            if isinstance(part, Responses):
                size += sum(map(len, part.results or ())) + len(part.body or b"")
            else:
                size += 2 * sum(map(len, part.entries))
            size += _RECORD_BYTES * len(part)
        return size
    return _ELEMENT_BYTES


class SizedPickleCoder(coders.PickleCoder):
    """Pickles, and estimates sizes without pickling."""

    def _create_impl(self) -> Any:
        return coder_impl.CallbackCoderImpl(_dumps, pickle.loads, estimated_bytes)


def _dumps(element: Any) -> bytes:
    return pickle.dumps(element, pickle.HIGHEST_PROTOCOL)


class FactsCoder(coders.Coder):
    """Writes values of one kind as facts; see `transforms.facts`.

    Attributes:
        version: Of the form. Another one is needed only where a fact that is added, and left out by
            bytes from before, does not do.
        what: What they are, for an error.
    """

    version = 1
    what = "values"

    @abstractmethod
    def facts(self, value: Any) -> Any:
        """What JSON can say of a value."""

    @abstractmethod
    def value(self, facts: Any) -> Any:
        """The value, of facts of this version or one before."""

    def encode(self, value: Any) -> bytes:
        return versioned(self.version, self.facts(value))

    def decode(self, encoded: bytes) -> Any:
        return self.value(unversioned(self.version, encoded, self.what))

    def is_deterministic(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))
