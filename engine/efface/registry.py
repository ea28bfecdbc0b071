"""Classes by name: how objectives and metrics, ours and users', are known."""

import dataclasses
from typing import Any, Generic, TypeVar

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])


class Registry(Generic[T]):
    """Dataclasses with a class attribute ``name``, by that name.

    Args:
        kind: what they are, for messages.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._classes: dict[str, type[T]] = {}

    def register(self, cls: C) -> C:
        """Add a class and return it, as a decorator does; a class that is defined anew takes the place of the old one.

        Raises:
            ValueError: the name is taken by another class.
        """
        taken = self._classes.get(cls.name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            place = f"{taken.__module__}.{taken.__qualname__}"
            raise ValueError(f"{self._kind} {cls.name!r}: already registered by {place}")
        self._classes[cls.name] = cls
        return cls

    def known(self) -> dict[str, type[T]]:
        """Return the classes by name, sorted."""
        return dict(sorted(self._classes.items()))

    def make(self, name: str, **parameters: Any) -> T:
        """Return an instance of the class called ``name``; case and underscores do not matter.

        Raises:
            ValueError: an unknown name, or a parameter that the class does not have; both list what is known.
        """
        names = {plain(known): known for known in self._classes}
        known = names.get(plain(name))
        if known is None:
            raise ValueError(f"{self._kind}: expected one of {', '.join(self.known())}, got {name!r}")
        cls = self._classes[known]
        fields = sorted(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
        if unknown := sorted(parameters.keys() - set(fields)):
            listed = ", ".join(fields) or "none"
            raise ValueError(f"{self._kind} {known!r}: has parameters {listed}, got {', '.join(unknown)}")
        return cls(**parameters)


def plain(name: str) -> str:
    """Return a name without what does not matter in it: case and underscores."""
    return name.lower().replace("_", "")
