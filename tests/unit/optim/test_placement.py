from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import pytest

from lightning_ted.optim.placement import ALIGNMENT, Placement, place_in_order, place_whole

Place = Callable[[Sequence[int], int], Placement]
both = pytest.mark.parametrize("place", [place_in_order, place_whole])


def _draws(count: int = 200) -> Iterator[tuple[list[int], int]]:
    """Sizes from none to far beyond the alignment, and a number of ranks."""
    draw = random.Random(0)
    for _ in range(count):
        largest = draw.choice([1, 3, ALIGNMENT, 1000, 100_000])
        yield [draw.randint(0, largest) for _ in range(draw.randint(1, 12))], draw.randint(1, 9)


@both
def test_each_element_is_owned_once(place: Place) -> None:
    for sizes, ranks in _draws():
        placement = place(sizes, ranks)
        pieces = [piece for rank in range(ranks) for piece in placement.owned(rank)]
        for index, size in enumerate(sizes):
            own = sorted((start, stop) for i, start, stop in pieces if i == index)
            borders = [0, *(stop for _, stop in own)]
            assert [start for start, _ in own] == borders[:-1] and borders[-1] == size, (sizes, ranks)


@both
def test_pieces_lie_in_their_shard_one_after_the_other(place: Place) -> None:
    for sizes, ranks in _draws():
        placement = place(sizes, ranks)
        for rank in range(ranks):
            end = placement.borders[rank]
            for index, start, stop in placement.owned(rank):
                assert start < stop and placement.offsets[index] + start >= end, (sizes, ranks)
                end = placement.offsets[index] + stop
            assert end <= placement.borders[rank + 1], (sizes, ranks)


@both
def test_counts_are_those_of_what_ranks_own(place: Place) -> None:
    for sizes, ranks in _draws():
        placement = place(sizes, ranks)
        for index in range(len(sizes)):
            own = [sum(stop - start for i, start, stop in placement.owned(rank) if i == index) for rank in range(ranks)]
            assert placement.counts(index) == own, (sizes, ranks)


@both
def test_parameters_and_shards_are_aligned(place: Place) -> None:
    for sizes, ranks in _draws():
        placement = place(sizes, ranks)
        assert placement.sizes == tuple(sizes)
        assert all(offset % ALIGNMENT == 0 for offset in (*placement.offsets, *placement.borders))


def test_in_order_shards_are_no_longer_than_they_must_be() -> None:
    for sizes, ranks in _draws():
        placement = place_in_order(sizes, ranks)
        aligned = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
        assert aligned <= placement.total < aligned + ranks * ALIGNMENT, (sizes, ranks)
        assert list(placement.offsets) == sorted(placement.offsets)


def test_whole_placement_cuts_no_parameter() -> None:
    for sizes, ranks in _draws():
        placement = place_whole(sizes, ranks)
        pieces = [piece for rank in range(ranks) for piece in placement.owned(rank)]
        assert all((start, stop) == (0, sizes[index]) for index, start, stop in pieces)


def test_whole_placement_is_balanced_to_the_largest_parameter() -> None:
    for sizes, ranks in _draws():
        filled = [0] * ranks
        placement = place_whole(sizes, ranks)
        for rank in range(ranks):
            filled[rank] = sum(-(-sizes[index] // ALIGNMENT) * ALIGNMENT for index, _, _ in placement.owned(rank))
        assert max(filled) - min(filled) <= max(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
        assert placement.shards == filled


@both
def test_one_rank_owns_all(place: Place) -> None:
    for sizes, _ in _draws(50):
        assert sorted(place(sizes, 1).owned(0)) == [(index, 0, size) for index, size in enumerate(sizes) if size]
