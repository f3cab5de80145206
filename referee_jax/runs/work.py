"""Work: the items of a process, handed out batch by batch.

Several processes share a run in one of two ways: each has a fixed `items.share` of the items, or, in
a pool of workers that come and go, each claims items that no other has (`Claims`).
"""

import collections
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from referee_jax import items as items_lib
from referee_jax.items import Item, Part
from referee_jax.storage import claims as claims_lib


class Fresh:
    """A queue of the items of an iterator, which are made as they are needed, and of what is put before and behind them."""

    def __init__(self, items: Iterable[Item]):
        self.before, self.items, self.behind = collections.deque(), iter(items), collections.deque()
        self.dropped: Collection[str] = ()

    def __bool__(self) -> bool:
        if not self.before:
            if (item := next((item for item in self.items if item.id not in self.dropped), None)) is not None:
                self.before.append(item)
            else:
                self.before, self.behind = self.behind, self.before
        return bool(self.before)

    def popleft(self) -> Item:
        """Takes the first. Raises IndexError where there is none."""
        bool(self)
        return self.before.popleft()

    def extendleft(self, items: Iterable[Item]) -> None:
        """Puts items to the front, the last one first."""
        self.before.extendleft(items)

    def extend(self, items: Iterable[Item]) -> None:
        """Puts items behind all others."""
        self.behind.extend(items)

    def drop(self, ids: Collection[str]) -> None:
        """Drops items with these ids, which include all that were dropped before."""
        self.dropped = ids
        for queue in (self.before, self.behind):
            kept = items_lib.missing(list(queue), ids)
            queue.clear()
            queue.extend(kept)


class Work:
    """Hands out `items` batch by batch, those in `begun` first.

    Args:
        items: what is to be made.
        begun: batches with a checkpoint, of any process; only their rows in `items` count.
        claims: in a pool, claims an item before it is handed out; the last ones are waited for.
        done: returns the ids of all finished items.
    """

    def __init__(
        self,
        items: Collection[Item],
        begun: Sequence[Part] = (),
        *,
        claims: claims_lib.Claims | None = None,
        done: Callable[[], Collection[str]] = frozenset,
    ):
        self.claims, self.done, self.begun = claims, done, []
        begun_items = set()
        for part in sorted(begun, key=lambda part: -part.step):
            part = part.only([item for item in part.items if item in items and item not in begun_items])
            if part.items:
                self.begun.append(part)
            begun_items.update(part.items)
        self.fresh = Fresh(item for item in items if item not in begun_items)

    def take(
        self,
        size: int,
        *,
        stopped: Callable[[], bool] = lambda: False,
        before_waiting: Callable[[], None] = lambda: None,
    ) -> Part | None:
        """Returns at most `size` items; None if none are left, or `stopped()` while waiting for others."""
        while (self.begun or self.fresh) and not stopped():
            is_begun = bool(self.begun)
            part = self._next(size)
            if not self.claims:
                return part
            if is_begun and not part.items:
                continue  # others have claimed all of it
            finished = self.done()  # after the claim: others may have finished items before it
            self.claims.release({item.id for item in part.items} & set(finished))
            self.fresh.drop(finished)
            if not part.items:
                before_waiting()
                time.sleep(claims_lib.WAIT if self.fresh else 0)
            elif unfinished := items_lib.missing(part.items, finished):
                return part.only(unfinished)
        return None

    def _next(self, size: int) -> Part:
        """The next batch, begun ones first; in a pool only items that could be claimed, perhaps none."""
        claim = self.claims.take if self.claims else lambda item: True
        if self.begun:
            part, *rest = self.begun.pop(0).split(size)
            self.begun[:0] = rest
            claimed = [item for item in part.items if claim(item)]
            self.fresh.extend(item for item in part.items if item not in claimed)
            return part.only(claimed)
        claimed, refused = [], []
        while self.fresh and len(claimed) < size:
            item = self.fresh.popleft()
            (claimed if claim(item) else refused).append(item)
        self.fresh.extendleft(reversed(refused))
        return Part(tuple(claimed))

    def put_back(self, part: Part) -> None:
        """Hands a part out again, next, from where it was."""
        if part.state:
            self.begun.insert(0, part)
        else:
            self.fresh.extendleft(reversed(part.items))
