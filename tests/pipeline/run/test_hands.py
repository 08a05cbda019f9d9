"""Hands: which partitions are paused, and what workers say together."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.hands import PAUSE, RETRY, Command, Inbox, Pauses, Told

KEYS = [(topic, number) for topic in "ab" for number in range(2)]
SCOPES = st.sampled_from([(None, None), ("a", None), ("b", None), *KEYS])


@given(st.booleans(), st.lists(st.tuples(SCOPES, st.booleans())))
def test_what_was_said_last_about_a_partition_holds(
    everywhere: bool, said: list[tuple[tuple[str | None, int | None], bool]]
) -> None:
    """Whether by itself, with its topic, or with all."""
    pauses = Pauses(everywhere)
    paused = dict.fromkeys(KEYS, everywhere)
    for (topic, partition), is_paused in said:
        command = Command(PAUSE, topic, partition)
        pauses.set(command, is_paused)
        for key in KEYS:
            if command.covers(key):
                paused[key] = is_paused
    assert {key: pauses.has(key) for key in KEYS} == paused
    assert bool(pauses) >= any(paused.values())


def test_workers_answer_together() -> None:
    """Done if one has done it; who has not is not heard of then."""
    did = Told(True, "paused", (("b", 1),), (("b", 1),))
    did_not = Told(False, "no such partition", (), (("a", 0),))
    assert Told.join([did_not, did]) == Told(True, "paused", (("b", 1),), (("a", 0), ("b", 1)))
    assert Told.join([did_not, did_not]).said == "no such partition"
    assert Told.join([]) == Told(False, "nobody has answered")


def test_the_loop_answers_who_asks() -> None:
    inbox = Inbox()
    found: list[Told] = []
    asker = threading.Thread(target=lambda: found.append(inbox.ask(Command(RETRY))))
    asker.start()
    taken = []
    while not taken:
        taken = inbox.take()
    ((command, answer),) = taken
    answer(Told(True, command.action))
    asker.join()
    assert found == [Told(True, RETRY)]
    assert inbox.take() == []


def test_a_loop_that_is_busy_is_said_to_be() -> None:
    inbox = Inbox()
    told = inbox.ask(Command(RETRY), secs=0.01)
    assert (told.done, "busy" in told.said) == (False, True)
    assert len(inbox.take()) == 1
