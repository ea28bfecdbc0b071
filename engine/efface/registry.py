"""A registry of dataclasses by name, for objectives and metrics, both built-in and user-defined."""

import dataclasses
from typing import Any, Generic, TypeVar

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])


class Registry(Generic[T]):
    """A mapping from names to dataclasses; each class is registered under its class attribute ``name``.

    Args:
        kind: what the classes are, for example "objective"; used in error messages.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._classes: dict[str, type[T]] = {}

    def register(self, cls: C) -> C:
        """Add a class and return it, so that the method can be used as a class decorator.

        A class with the same qualified name as the registered one, such as a class defined again in a notebook,
        replaces it.

        Raises:
            ValueError: if another class is registered under the name.
        """
        taken = self._classes.get(cls.name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            place = f"{taken.__module__}.{taken.__qualname__}"
            raise ValueError(f"{self._kind} {cls.name!r}: already registered by {place}; choose another name")
        self._classes[cls.name] = cls
        return cls

    def known(self) -> dict[str, type[T]]:
        """Return the registered classes by name, in the order of the names."""
        return dict(sorted(self._classes.items()))

    def make(self, name: str, **parameters: Any) -> T:
        """Return an instance of the class registered as ``name``; case and underscores are ignored.

        Raises:
            ValueError: if the name is unknown, or if the class has no such parameter. The message lists the known
                names or the parameters of the class.
        """
        names = {plain(known): known for known in self._classes}
        known = names.get(plain(name))
        if known is None:
            raise ValueError(f"{self._kind}: expected one of {', '.join(self.known())}, got {name!r}")
        cls = self._classes[known]
        fields = sorted(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
        if unknown := sorted(parameters.keys() - set(fields)):
            listed = ", ".join(fields) or "none"
            raise ValueError(f"{self._kind} {known!r}: expected parameters from ({listed}), got {', '.join(unknown)}")
        return cls(**parameters)


def plain(name: str) -> str:
    """Return a name in lower case and without underscores, the form in which names are compared."""
    return name.lower().replace("_", "")
