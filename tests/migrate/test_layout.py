"""Layouts: the pieces of each slot, and what is refused."""

from __future__ import annotations

import pytest
from plain_schedule import flat_layout

from distplb import DistplbError
from distplb.migrate.layout import Layout, Part, Piece, joined


def test_a_shard_that_cuts_through_experts_is_a_piece_of_each() -> None:
    layout = flat_layout(row=4, num_slots=3, held=((0, 6), (6, 7), (7, 7), (7, 12)))
    assert not layout.is_everywhere
    assert layout.pieces == (
        (Piece(0, 0, 4, 0),),
        (Piece(0, 0, 2, 4), Piece(1, 2, 3, 0), Piece(3, 3, 4, 0)),
        (Piece(3, 0, 4, 1),),
    )


def test_a_range_held_twice_comes_once_for_each_rank() -> None:
    layout = flat_layout(row=2, num_slots=2, held=((2, 4), (0, 2), (2, 4)))
    assert layout.pieces == ((Piece(1, 0, 2, 0),), (Piece(0, 0, 2, 0), Piece(2, 0, 2, 0)))


@pytest.mark.parametrize(
    ("held", "slot", "reached"),
    [
        (((4, 8),), 0, 0),
        (((0, 4),), 1, 0),
        (((0, 3), (5, 8)), 0, 3),
        (((5, 8), (0, 3)), 0, 3),
        (((0, 4), (0, 4)), 1, 0),
        (((0, 0), (8, 8)), 0, 0),
        (((0, 7), (2, 5), (7, 7)), 1, 3),
        ((), 0, 0),
    ],
)
def test_elements_that_no_rank_holds_are_refused(held: tuple[tuple[int, int], ...], slot: int, reached: int) -> None:
    with pytest.raises(DistplbError) as refused:
        flat_layout(row=4, num_slots=2, held=held)
    assert f"no rank holds element {reached} (of 4) of slot {slot} (slots held by rank: [" in str(refused.value)
    assert "check `gpu`, the starts of the shards, and that the communicator has all ranks" in str(refused.value)


def test_columns_that_no_rank_holds_are_refused() -> None:
    with pytest.raises(DistplbError, match=r"no rank holds element 2 \(of 4\) of slot 0"):
        Layout(row=4, num_slots=2, held=((Part(0, 4, 0, 2),), (Part(0, 2, 3, 4),)))


@pytest.mark.parametrize("part", [Part(4, 12, 0, 4), Part(-2, 4, 0, 4), Part(0, 8, 2, 5), Part(0, 5, 0, 2)])
def test_a_part_outside_of_all_slots_is_refused(part: Part) -> None:
    """A part that went beyond the last slot was reported as elements that no rank holds."""
    with pytest.raises(DistplbError) as refused:
        Layout(row=4, num_slots=2, held=((Part(0, 8, 0, 4),), (part,)))
    words = f"rank 1 holds elements {part.start} to {part.stop} of columns {part.low} to {part.high} of 2 slots × 4"
    assert words in str(refused.value)


def test_the_most_that_a_rank_holds_of_a_slot_and_whether_ranks_hold_slots_of_one_gpu() -> None:
    columns = Layout(row=4, num_slots=2, held=((Part(0, 2, 0, 1),), (Part(0, 6, 1, 4),)))
    assert columns.max_row == 3
    assert columns.slots == ((0, 1), (0, 1))
    assert columns.is_by_gpu(2)
    assert not columns.is_by_gpu(1)
    assert flat_layout(4, 2, ((0, 4), (4, 8), (5, 5))).is_by_gpu(1)
    assert flat_layout(4, 2, ((0, 4), (4, 8), (5, 5))).has_empty_rank


def test_parts_that_continue_each_other_are_one() -> None:
    parts = [Part(0, 4, 0, 4), Part(4, 6, 0, 4), Part(6, 6, 0, 4), Part(7, 8, 0, 4), Part(8, 9, 0, 2)]
    assert joined(parts) == (Part(0, 6, 0, 4), Part(7, 8, 0, 4), Part(8, 9, 0, 2))
