"""Work: one item is one image to be made, named by its prompt and the number of the sample, never by who makes it.

Several processes share a run in one of two ways: each has a fixed `share` of the items, or, in a pool of workers that come
and go, each takes what nobody has yet (`Claims`). `Work` hands them out batch by batch, those first that are begun already.
"""

import collections
import time
from collections.abc import Callable, Collection, Sequence

from referee_jax import items as items_lib
from referee_jax.items import Item, Part
from referee_jax.storage import claims as claims_lib


class Work:
    """What is left to do for this process, handed out batch by batch.

    `begun` are batches that an earlier process has left in the middle; of those only what is wanted counts. With `claims`
    every item is asked for before it is handed out, and the last ones are waited for: `done()` says which ids are.
    """

    def __init__(
        self,
        wanted: Sequence[Item],
        begun: Sequence[Part] = (),
        *,
        claims: claims_lib.Claims | None = None,
        done: Callable[[], Collection[str]] = frozenset,
    ):
        self.claims, self.done, self.begun = claims, done, []
        left = dict.fromkeys(wanted)
        for part in sorted(begun, key=lambda part: -part.step):
            part = part.only(left.keys())
            if part.items:
                self.begun.append(part)
            for item in part.items:
                del left[item]
        self.fresh = collections.deque(left)

    def take(
        self,
        size: int,
        *,
        stopped: Callable[[], bool] = lambda: False,
        before_waiting: Callable[[], None] = lambda: None,
    ) -> Part | None:
        """The next at most `size` items, or None where nothing is left, or `stopped()` while the last ones are waited for."""
        while (self.begun or self.fresh) and not stopped():
            is_begun = bool(self.begun)
            part = self._next(size)
            if not self.claims:
                return part
            if is_begun and not part.items:
                continue  # another has it; the next may be had
            finished = self.done()  # also what others did between our last look and the claim
            self.claims.release({item.id for item in part.items} & set(finished))
            self.fresh = collections.deque(items_lib.missing(self.fresh, finished))
            if not part.items:
                before_waiting()
                time.sleep(claims_lib.WAIT if self.fresh else 0)
            elif left := items_lib.missing(part.items, finished):
                return part.only(left)
        return None

    def _next(self, size: int) -> Part:
        """Begun ones first; in a pool those that can be had, perhaps none."""
        is_ours = self.claims.take if self.claims else lambda item: True
        if self.begun:
            part, *rest = self.begun.pop(0).split(size)
            self.begun[:0] = rest
            ours = [item for item in part.items if is_ours(item)]
            self.fresh.extend(item for item in part.items if item not in ours)
            return part.only(ours)
        taken, passed = [], []
        while self.fresh and len(taken) < size:
            item = self.fresh.popleft()
            (taken if is_ours(item) else passed).append(item)
        self.fresh.extendleft(reversed(passed))
        return Part(tuple(taken))

    def put_back(self, part: Part) -> None:
        """A part that was not made comes first; what was begun goes on from there."""
        if part.state:
            self.begun.insert(0, part)
        else:
            self.fresh.extendleft(reversed(part.items))
