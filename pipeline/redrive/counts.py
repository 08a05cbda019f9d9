"""Counts: what a redrive found in the error topic, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transforms.redrive.selection import ErrorRecord, Original


@dataclass(slots=True)
class Tally:
    """Error records, and the records in them."""

    error_records: int = 0
    records: int = 0

    def add(self, records: int) -> None:
        self.error_records += 1
        self.records += records

    def facts(self) -> dict[str, int]:
        return {"error_records": self.error_records, "records": self.records}


@dataclass(slots=True)
class Counts:
    """What was found in the error topic.

    Attributes:
        taken: Error records that are redriven, and the records in them.
        repeated: Records among those that an error record before held, too.
        conditions: The same by condition.
        error_types: The same by error type.
        partitions: The same by topic and partition of the records.
        left: Error records that are not redriven, by why.
    """

    taken: Tally = field(default_factory=Tally)
    repeated: int = 0
    conditions: dict[str, Tally] = field(default_factory=dict)
    error_types: dict[str, Tally] = field(default_factory=dict)
    partitions: dict[str, Tally] = field(default_factory=dict)
    left: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("before", "not_selected", "over_limit", "other_topics", "without_originals"), 0
        )
    )

    def take(self, record: ErrorRecord, originals: Sequence[Original]) -> None:
        """Count an error record that is redriven."""
        self.taken.add(len(originals))
        partition = f"{originals[0]['topic']}-{originals[0]['partition']}"
        for tallies, name in (
            (self.conditions, record.condition),
            (self.error_types, record.error_type),
            (self.partitions, partition),
        ):
            tallies.setdefault(name, Tally()).add(len(originals))

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        by = {
            "conditions": self.conditions,
            "error_types": self.error_types,
            "partitions": self.partitions,
        }
        return {
            **self.taken.facts(),
            "repeated": self.repeated,
            **{
                name: {key: tally.facts() for key, tally in sorted(tallies.items())}
                for name, tallies in by.items()
            },
            "left": dict(self.left),
        }

    def text(self) -> str:
        """The same for people."""
        lines = [
            f"error records: {self.taken.error_records}, records in them: {self.taken.records}, "
            f"of those repeated: {self.repeated}"
        ]
        for title, tallies in (
            ("condition", self.conditions),
            ("error type", self.error_types),
            ("partition", self.partitions),
        ):
            if tallies:
                width = max(map(len, (title, *tallies)))
                lines.append(f"{title:{width}}  error records    records")
                lines += [
                    f"{name:{width}}  {tally.error_records:>13}  {tally.records:>9}"
                    for name, tally in sorted(tallies.items())
                ]
        lines.append(self.left_text())
        return "\n".join(lines)

    def left_text(self) -> str:
        """Error records that are not redriven."""
        left = ", ".join(
            f"{name.replace('_', ' ')}: {count}" for name, count in self.left.items() if count
        )
        return f"left where they are: {left or 'none'}"
