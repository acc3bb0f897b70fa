"""Put weights that a graph looks up in a memory into the form of the hash operators.

``W = ...(Gather(memory, slots)) -> W = HashWeight(memory, ...)``, with products and look-ups fused
as for any weight. The weights become initializers for as long as the compiler looks for their uses.
The memory is stored with the bits that it has in the graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.codecs.hash.codec import HashCodec
from onnxcomp.passes.codecs.hash.format import ChunkLayout, Sharing, expand, shared_tensors
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.ir import metadata
from onnxcomp.passes.ir.manifest import shared_name
from onnxcomp.passes.ir.traversal import LISTING_IR, Names, new_initializer, remove_initializer
from onnxcomp.passes.lowering.rewrite import Placement
from onnxcomp.passes.transforms.dedup_index_tables import remove_chain
from onnxcomp.passes.transforms.shared_lookups import Lookup, find_lookups
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["SharedLookups", "mark_trained", "trained_payload"]

# Keys of entries that several weights share; those of other weights are no shared tensors.
_MEMORY = "hash.memory."


def trained_payload(
    memory: Array, scale: Array, geometry: ChunkLayout, sharing: Sharing
) -> Payload:
    """A weight in a memory that is stored once for all weights that lie in it.

    Args:
        memory: float32 ``(slots, 256)``.
        scale: float32 (1,).
        geometry: Sizes of the weight.
        sharing: The map.
    """
    digest = hashlib.sha256(memory.tobytes()).hexdigest()[:16]
    shared = {
        f"{_MEMORY}{digest}": memory,
        "hash.codes.none": np.zeros((1, 1, 1), np.uint8),
        **shared_tensors(geometry, sharing),
    }
    return Payload({"scale": scale}, shared)


def mark_trained(model: ir.Model) -> None:
    """Let the memories of a rewritten model be listed as what they are."""
    for name, value in model.graph.initializers.items():
        if name.startswith(shared_name(_MEMORY)):
            value.meta[metadata.TRAINED] = ()


@dataclasses.dataclass(slots=True)
class _Dense:
    """A weight while it is an initializer.

    Attributes:
        value: The initializer.
        lookup: What it stands for.
        replaced: Values of the graph in whose place it stands, each with who read it.
    """

    value: ir.Value
    lookup: Lookup
    replaced: list[tuple[ir.Value, list[tuple[ir.Node, int]]]]


class SharedLookups:
    """All weights of a model that are looked up in memories, as initializers.

    Attributes:
        found: The weights by the names of their initializers.
    """

    def __init__(self, model: ir.Model, *, freeze_inputs: bool = False) -> None:
        self.found: Mapping[str, _Dense] = {}
        self._frozen = freeze_inputs or model.ir_version < LISTING_IR
        by_content: dict[tuple[object, ...], _Dense] = {}
        names = Names(model)
        for item in find_lookups(model, frozen=self._frozen):
            key = (item.memory, item.sharing, float(item.scale), item.shape)
            if key not in by_content:
                wanted = f"{item.layer}.weight" if item.layer else item.value.name or "weight"
                value = new_initializer(model, names.value(wanted), _multiplied_out(item))
                by_content[key] = _Dense(value, item, [])
            weight = by_content[key]
            uses = [(use.node, use.idx) for use in item.value.uses()]
            weight.replaced.append((item.value, uses))
            item.value.replace_all_uses_with(weight.value)
        self.found = {weight.value.name or "": weight for weight in by_content.values()}

    def placements(self, sites: Sequence[WeightSite]) -> tuple[list[Placement], list[str]]:
        """How the weights among `sites` are stored; the others are looked up again as before.

        Their memory stays as it is then: whoever leaves a weight out wants its values.

        Returns:
            Placements, and a note on each memory of which some weights were left out.
        """
        by_name = {site.name: site for site in sites if site.name in self.found}
        placed, notes = [], {}
        for name, weight in self.found.items():
            if name in by_name:
                placed.append(_placement(by_name[name], weight.lookup))
            else:
                _restore(weight)
                kept = weight.lookup.memory
                kept.meta[metadata.TRAINED] = (*kept.meta.get(metadata.TRAINED, ()), name)
                notes[kept.name] = f"{kept.name}: is stored twice, because {name} is left as it is"
        return placed, list(notes.values())

    def remove_unused(self) -> None:
        """Remove the nodes that looked weights up, and memories that nobody reads any more."""
        for weight in self.found.values():
            for value, _ in weight.replaced:
                producer = value.producer()
                if producer is not None and not value.uses() and producer.graph is not None:
                    remove_chain(producer, listed=self._frozen)


def _multiplied_out(item: Lookup) -> Array:
    """The dense weight in the shape that it has in the graph."""
    memory, scale = _memory(item), np.array([item.scale], np.float32)
    matrix = expand(memory, scale, item.geometry, item.sharing)
    return matrix.reshape(item.shape)


def _memory(item: Lookup) -> Array:
    assert item.memory.const_value is not None
    return np.ascontiguousarray(item.memory.const_value.numpy(), np.float32)


def _placement(site: WeightSite, item: Lookup) -> Placement:
    scale = np.array([item.scale], np.float32)
    payload = trained_payload(_memory(item), scale, item.geometry, item.sharing)
    return Placement(site, HashCodec(), payload)


def _restore(weight: _Dense) -> None:
    """Give the readers of an initializer back what they read before."""
    for value, uses in weight.replaced:
        for node, index in uses:
            node.replace_input_with(index, value)
    remove_initializer(weight.value)
