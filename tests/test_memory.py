"""Memory goes back to the system."""

import weakref

from mxcompile import memory


class Node:
    other: "Node"


def test_cycles_are_freed() -> None:
    first, second = Node(), Node()
    first.other, second.other = second, first
    gone = weakref.ref(first)
    del first, second
    memory.release()
    assert gone() is None
