"""Make the nodes and initializers a codec asks for, at the place of one use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.ir.manifest import KEY, own_name, shared_name
from onnxcomp.passes.ir.traversal import Names, new_initializer
from onnxcomp.passes.weight import DOMAIN, Array, Attribute, WeightSite

__all__ = ["GraphBuilder", "InitializerPool", "attribute"]


def attribute(name: str, value: Attribute) -> ir.Attr:
    """A node attribute from a plain value; sequences hold integers."""
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, Sequence):
        return ir.AttrInt64s(name, [int(item) for item in value])
    return ir.AttrInt64(name, int(value))


class InitializerPool:
    """The initializers that payloads need, made once each, in the main graph.

    Attributes:
        names: Names taken in the model.
        operators: Operators of our own domain that nodes were made of.
        domains: Other domains but the default one that nodes were made of.
    """

    def __init__(self, model: ir.Model, opset: int) -> None:
        self.opset = opset
        self.names = Names(model)
        self.operators: set[str] = set()
        self.domains: set[str] = set()
        self._model = model
        self._made: dict[str, tuple[Array, ir.Value]] = {}

    def own(self, name: str, array: Array) -> ir.Value:
        """The initializer of this name, which belongs to one weight."""
        if name not in self._made:
            if self.names.value(name) != name:
                raise ModelError(
                    f"the model already has a value called {name!r}",
                    hint="expand the model before compressing it again",
                )
            self._made[name] = (array, new_initializer(self._model, name, array))
        return self._made[name][1]

    def shared(self, name: str, array: Array) -> ir.Value:
        """The initializer of this name, which may be there from an earlier run."""
        existing = self._model.graph.initializers.get(name)
        if name in self._made or existing is None or existing.const_value is None:
            return self.own(name, array)
        if not np.array_equal(existing.const_value.numpy(), array):
            raise ModelError(f"the initializer {name!r} exists with other content")
        return existing


class GraphBuilder:
    """The `Builder` of a codec for one use.

    Args:
        pool: Initializers of the model.
        anchor: New nodes go before this node, into its graph.
        label: What new nodes are called after.
        site: The weight.
        codec: Name of its codec.
        payload: What is stored.
    """

    def __init__(
        self,
        pool: InitializerPool,
        anchor: ir.Node,
        label: str,
        site: WeightSite,
        codec: str,
        payload: Payload,
    ) -> None:
        self._pool = pool
        self._anchor = anchor
        self._label = label
        self._site = site
        self._codec = codec
        self._payload = payload

    @property
    def opset(self) -> int:
        """Version of the default domain in the model."""
        return self._pool.opset

    def tensor(self, key: str) -> ir.Value:
        """The initializer that holds one tensor of the payload."""
        if key in self._payload.tensors:
            name = own_name(self._site.name, key)
            return self._pool.own(name, self._payload.tensors[key])
        return self._pool.shared(shared_name(key), self._payload.shared[key])

    def constant(self, key: str, array: Array) -> ir.Value:
        """A small initializer, stored once per model for each `key`."""
        return self._pool.shared(shared_name(key), np.asarray(array))

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
    ) -> ir.Value:
        """Add a node with one output before the use and return the output."""
        given = [attribute(key, value) for key, value in (attributes or {}).items()]
        return self._added(domain, op_type, inputs, given, 1)[0]

    def outputs(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        count: int,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Sequence[ir.Value]:
        """Add a node of the default domain with several outputs and return them."""
        given = [attribute(key, value) for key, value in (attributes or {}).items()]
        return self._added("", op_type, inputs, given, count)

    def _added(
        self,
        domain: str,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Sequence[ir.Attr],
        count: int,
    ) -> Sequence[ir.Value]:
        name = self._pool.names.node(f"{self._label}/{op_type}")
        node = ir.Node(
            domain,
            op_type,
            inputs,
            attributes,
            num_outputs=count,
            name=name,
            metadata_props={KEY: self._codec},
        )
        for output in node.outputs:
            output.name = self._pool.names.value(name)
        if domain == DOMAIN:
            self._pool.operators.add(op_type)
        elif domain:
            self._pool.domains.add(domain)
        graph = self._anchor.graph
        assert graph is not None
        graph.insert_before(self._anchor, node)
        return node.outputs
