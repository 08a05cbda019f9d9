"""The demo's Lambda function: takes a batch of orders, returns a result for each.

Copy it to begin your own. `event` is the batch, `[{"payload": {"timestamp", "topic", "partition",
"offset", "key", "value"}}]`; the reply has one entry per record in the same order, and says by
topic, partition and offset which record it answers.
"""

from __future__ import annotations

from typing import Any

TAX = 0.19


def handler(event: list[dict[str, Any]], context: Any) -> list[dict[str, Any]]:
    """Answer every order of the batch, or fail as a whole.

    Raises:
        ValueError: An order has no amount.
    """
    return [{"payload": _answer(entry["payload"])} for entry in event]


def _answer(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "timestamp": record["timestamp"],
        "topic": record["topic"],
        "partition": record["partition"],
        "offset": record["offset"],
        "result": _settle(record["value"]),
    }


def _settle(order: dict[str, Any]) -> dict[str, Any]:
    if "amount" not in order:
        raise ValueError(f"order {order['order']} has no amount")
    total = round(order["amount"] * (1 + TAX), 2)
    return {"order": order["order"], "status": "accepted", "total": total}
