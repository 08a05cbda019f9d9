"""Invoke: ordered calls, and what their outcomes mean. The call itself is in `transforms.aws`."""
