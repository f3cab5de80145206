"""Work: the items of a process, handed out batch by batch."""

import itertools
from collections.abc import Collection, Sequence

from referee_jax.items import Item, Part


class Work:
    """Hands out `items` batch by batch, those in `begun` first.

    Args:
        items: what is to be made; each is made as it is handed out.
        begun: batches with a checkpoint, of any process; only their rows in `items` count.
    """

    def __init__(self, items: Collection[Item], begun: Sequence[Part] = ()):
        self.begun, begun_items = [], set()
        for part in sorted(begun, key=lambda part: -part.step):
            part = part.only([item for item in part.items if item in items and item not in begun_items])
            if part.items:
                self.begun.append(part)
            begun_items.update(part.items)
        self.fresh = (item for item in items if item not in begun_items)

    def take(self, size: int) -> Part | None:
        """Returns at most `size` items; None if none are left."""
        if self.begun:
            part, *rest = self.begun.pop(0).split(size)
            self.begun[:0] = rest
            return part
        items = tuple(itertools.islice(self.fresh, size))
        return Part(items) if items else None

    def put_back(self, part: Part) -> None:
        """Hands a part out again, next, from where it was."""
        if part.state:
            self.begun.insert(0, part)
        else:
            self.fresh = itertools.chain(part.items, self.fresh)
