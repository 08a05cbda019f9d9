"""Coding: how the values that travel between the steps become bytes.

Pickled, as their columns are C's to pickle, a thousand records in one go. What Beam's own pickling
coder lacks is a cheap answer to how large an element is: Beam asks for that at each step, of the
first elements of each bundle and of some later ones, and would have each of them pickled for it.
"""

from __future__ import annotations

import pickle
from typing import Any

from apache_beam import coders
from apache_beam.coders import coder_impl

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
