"""What codecs make nodes with; the graph is not theirs to see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from onnxcomp.passes.weight import Array, Attribute

__all__ = ["Builder"]

V = TypeVar("V")


class Builder(Protocol[V]):
    """Makes initializers and nodes at the place of one use. `V` is the graph's value type."""

    @property
    def opset(self) -> int:
        """Version of the default domain in the model."""
        ...

    def tensor(self, key: str) -> V:
        """The initializer that holds ``payload.tensors[key]`` or ``payload.shared[key]``."""
        ...

    def constant(self, key: str, array: Array) -> V:
        """A small initializer, stored once per model for each `key`."""
        ...

    def node(
        self,
        op_type: str,
        inputs: Sequence[V],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
    ) -> V:
        """Add a node with one output before the use and return the output."""
        ...

    def outputs(self, op_type: str, inputs: Sequence[V], count: int) -> Sequence[V]:
        """Add a node of the default domain with several outputs and return them."""
        ...
