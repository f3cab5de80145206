"""Tables of variants by name, to which a module of the user's adds rows by a decorator."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any


class Registry(dict[str, Any]):
    """Rows by name; `decorator` is what a user adds one by."""

    def __init__(self, decorator: str, rows: Mapping[str, Any]):
        super().__init__(rows)
        self._decorator = decorator
        self._sources: dict[str, tuple[str, str]] = {}

    def register(self, name: str, row: Callable[[Any], Any] = lambda value: value) -> Callable[[Any], Any]:
        """A decorator that adds a function under `name`, as `row` makes it a row.

        It raises ValueError where another function has the name; the same one may come again, as when
        its module is imported anew.
        """

        def add(value: Any) -> Any:
            source = value.__module__, value.__qualname__
            if name in self and self._sources.get(name) != source:
                raise ValueError(f"the name {name!r} is taken by another; give {source[1]} one of its own")
            self[name], self._sources[name] = row(value), source
            return value

        return add

    def added(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are a user's."""
        return [name for name in names if name in self._sources]

    def known(self) -> str:
        """The names, and how one is added, for messages."""
        hint = f'or your own: @{self._decorator}("name") in a module of config.plugins, see docs/plugins.md'
        return ", ".join([*map(repr, self), hint])
