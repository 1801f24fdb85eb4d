"""What `accelerate` sets on the modules of an object, and how it is taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..merge import MergedBlocks


@dataclass(eq=False)
class Part:
    """An attribute that is set on an object, its own before, or none.

    All of it is copied and pickled with the object that was accelerated, so that its copies can be restored.

    Attributes:
        owner: the object, or a module that it holds.
        name: of the attribute.
        value: what is set.
        line: what a report says of it; "": nothing.
    """

    owner: Any
    name: str
    value: Any
    line: str = ""
    _before: tuple[Any, ...] = ()

    def put(self) -> None:
        """Set the attribute, and remember what was there."""
        self._before = own(self.owner, self.name)
        setattr(self.owner, self.name, self.value)

    def take_off(self) -> None:
        """Undo it, unless somebody has set another value since."""
        found = own(self.owner, self.name)
        if not (found and found[0] is self.value):
            return
        if self._before:
            setattr(self.owner, self.name, self._before[0])
        else:
            object.__delattr__(self.owner, self.name)


@dataclass(eq=False)
class LatePart(Part):
    """An attribute whose value is made when it is set, from what was set before it."""

    make: Callable[[], Any] | None = None

    def put(self) -> None:
        """Make the value and set it."""
        assert self.make is not None
        self.value, self.make = self.make(), None
        super().put()


@dataclass(eq=False)
class MergePart(Part):
    """Token merging in the blocks of a transformer, the owner; the value is the `MergedBlocks`, once they are."""

    make: Callable[[], MergedBlocks] | None = None

    def put(self) -> None:
        """Hang the hooks."""
        assert self.make is not None
        self.value, self.make = self.make(), None

    def take_off(self) -> None:
        """Take them off."""
        self.value.remove()


def put_all(parts: Iterable[Part]) -> None:
    """Put all parts, or none where one can't be."""
    done: list[Part] = []
    try:
        for part in parts:
            part.put()
            done.append(part)
    except BaseException:
        take_off_all(done)
        raise


def take_off_all(parts: Iterable[Part]) -> None:
    """Take parts off, the last one first."""
    for part in reversed(list(parts)):
        part.take_off()


def own(obj: Any, name: str) -> tuple[Any, ...]:
    """An attribute that the object has itself, its class and, of a module, its submodules among them; () where none."""
    if name == "__class__":
        return (type(obj),)
    for attributes in (vars(obj), vars(obj).get("_modules") or {}):
        if name in attributes:
            return (attributes[name],)
    return ()
