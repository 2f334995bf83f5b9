"""Sequences whose items are computed when they are read, so that a decoder need not be in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, overload

T = TypeVar("T")


class LazySequence(Sequence[T]):
    """Items that are computed each time they are read: none of them stays in memory.

    outline: stand-ins that cost nothing, with the same fields as the items; layers have tensors on the meta device."""

    def __init__(self, compute: Callable[[int], T], count: int, outline: Sequence[Any] = ()) -> None:
        self._compute, self._count, self.outline = compute, count, outline

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        return map(self._compute, range(self._count))  # unlike a generator, it keeps no item

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return tuple(self._compute(i) for i in range(*index.indices(self._count)))
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._compute(index % self._count)


def map_items(function: Callable[..., T], *sequences: Sequence[Any]) -> Sequence[T]:
    """function(item, …) over sequences of one length: a tuple, or lazy where the first sequence is lazy."""
    first = sequences[0]
    if not isinstance(first, LazySequence):
        return tuple(function(*items) for items in zip(*sequences, strict=True))
    return LazySequence(lambda i: function(*(items[i] for items in sequences)), len(first), first.outline)


def select_items(items: Sequence[T], indices: Sequence[int]) -> Sequence[T]:
    """The items at these indices: a tuple, or lazy where the sequence is lazy."""
    if not isinstance(items, LazySequence):
        return tuple(items[i] for i in indices)
    return LazySequence(lambda i: items[indices[i]], len(indices), tuple(items.outline[i] for i in indices))


def outline_of(items: Sequence[T]) -> Sequence[T]:
    """The outline of a lazy sequence; of another one, the items themselves."""
    return items.outline if isinstance(items, LazySequence) else items
