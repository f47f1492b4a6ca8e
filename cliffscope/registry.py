"""Which objects of a kind are there, and how does a user bring their own?

1. The package registers its own objects (methods, judges, templates, criteria, readouts) under their names.
2. An installed package may offer more through entry points of the registry's group, which are loaded when asked for.
3. Text of the form `package.module:name` imports an object that nobody registered; an object passed as such is taken
   as it is.

Knows nothing of what the objects do: each kind says which class its objects have.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from cliffscope.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True, eq=False, kw_only=True)
class Registry(Generic[T]):
    """Objects of one kind by name."""

    kind: str
    """What the objects are, in the singular, as error messages call them: "method"."""
    group: str
    """Entry-point group, such as "cliffscope.methods"."""
    expected: type[T]
    """Class that every object has."""
    objects: dict[str, T] = field(default_factory=dict)
    """Registered objects by name, in the order in which they are documented."""

    def register(self, name: str, value: T) -> T:
        """Adds an object.

        Args:
            name: its name on the command line, in results and in figures.
            value: the object.

        Returns:
            The object.

        Raises:
            DataError: the name is taken, or the object is of another class.
        """
        if name in self.objects:
            raise DataError(f"{self.kind.capitalize()} {name!r} is registered already. Choose a different name.")
        self.objects[name] = self._checked(name, value)
        return value

    def names(self) -> tuple[str, ...]:
        """Every name: registered objects first, then those of installed packages."""
        return (*self.objects, *(name for name in self._offered() if name not in self.objects))

    def get(self, choice: T | str) -> T:
        """The object that is meant.

        Args:
            choice: a registered name, the name of an entry point, `package.module:name`, or an object.

        Returns:
            The object.

        Raises:
            DataError: there is no such name, the import fails, or the object is of another class.
        """
        if not isinstance(choice, str):
            return self._checked(repr(choice), choice)
        if choice in self.objects:
            return self.objects[choice]
        if choice in (offered := self._offered()):
            return self._import(offered[choice])
        if ":" in choice:
            return self._import(choice)
        raise DataError(
            f"There is no {self.kind} {choice!r}. Expected one of {', '.join(self.names())}, or package.module:name."
        )

    def __iter__(self) -> Iterator[tuple[str, T]]:
        """Names and objects registered by the package, in order."""
        return iter(self.objects.items())

    def _offered(self) -> Mapping[str, str]:
        return {point.name: point.value for point in entry_points(group=self.group)}

    def _import(self, place: str) -> T:
        module, _, name = place.partition(":")
        try:
            value: object = import_module(module)
            for part in name.split("."):
                value = getattr(value, part)
        except (ImportError, AttributeError, ValueError) as error:
            raise DataError(
                f"The {self.kind} {place!r} cannot be imported: {error}. Expected package.module:name of a module that "
                "Python can import from here."
            ) from error
        return self._checked(place, value)

    def _checked(self, name: str, value: object) -> T:
        if not isinstance(value, self.expected):
            raise DataError(
                f"{name} is a {type(value).__name__}, not a {self.kind}. Expected an instance of "
                f"{self.expected.__module__}.{self.expected.__qualname__}."
            )
        return value
