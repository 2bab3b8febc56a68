"""What the thread that looks after waits for messages remembers of them."""

from __future__ import annotations

import weakref
from typing import Any

from distplb.comm.message_watch import MessageWatch


class Work:
    """In place of a message, which holds its tensor."""

    def __init__(self) -> None:
        self.ended = 0

    def wait(self, _: Any) -> None:
        self.ended += 1


def test_messages_are_not_held_once_their_wait_is_over() -> None:
    """The thread remembered the messages themselves until it looked again, and with them their tensors, for a second:
    as many bytes as a step's replicas or their gradients.
    """
    watch, works = MessageWatch(lambda _: False, seconds=1000), [Work()]
    message = weakref.ref(works[0])
    with watch.over(works):  # type: ignore[arg-type]
        before = watch.look(None)  # as the thread does, which keeps this until the next look
    del works
    assert message() is None
    assert before is not None
    assert watch.look(before) is None


def test_only_a_wait_that_lasts_from_one_look_to_the_next_is_ended() -> None:
    watch, first, second = MessageWatch(lambda _: True, seconds=1000), [Work()], [Work()]
    with watch.over(first):  # type: ignore[arg-type]
        before = watch.look(None)
    with watch.over(second):  # type: ignore[arg-type]
        before = watch.look(before)
        assert (first[0].ended, second[0].ended) == (0, 0)
        watch.look(before)
    assert (first[0].ended, second[0].ended) == (0, 1)
