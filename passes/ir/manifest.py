"""What a compressed model says about itself: one metadata entry, enough to expand and inspect it.

The entry `onnxcomp` is JSON. Sites with equal settings share a recipe::

    {"version": 1,
     "recipes": [{"codec": "hyper", "params": {...}, "mode": "auto", "attributes": {...},
                  "tensors": ["codes", "scales"], "shared": ["hyper.table.k4.L7", ...]}],
     "sites": {"fc1.weight": [0, [256, 64], "float32", 64, 256, true], ...}}

A site lists its recipe, the stored tensor's shape and dtype, rows, length and transposed; a stack
of matrices also how many, in documents of version 2, which are the same else. The
tensor `codes` of site `fc1.weight` is the initializer ``fc1.weight::codes``; a shared tensor has
the domain in front: ``com.onnxcomp::hyper.table.k4.L7``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.weight import DOMAIN, Attribute, WeightSite

__all__ = [
    "KEY",
    "STAGE_KEY",
    "USE_KEY",
    "WEIGHT_KEY",
    "ManifestEntry",
    "Recipe",
    "compressed_tensors",
    "own_name",
    "read_manifest",
    "shared_name",
    "write_manifest",
]

# Key of the model's entry, and on a node the codec that asked for it.
KEY = "onnxcomp"
# On the node whose output is a whole decoded weight in its stored form: the name of the weight.
WEIGHT_KEY = "onnxcomp.weight"
# On the node whose output is a product or a look-up by standard operators: JSON of the weight's
# name, of what is done with it ("matmul", "gather", "experts"), of the inputs that lead to the
# operand, of the element type where it is another, and of those that lead to indices of a stack.
USE_KEY = "onnxcomp.use"
# On nodes that make weights wait for each other while a model is loaded, see `lowering.stages`.
STAGE_KEY = "onnxcomp.stage"
# Without a stack of matrices the version is 1, which older releases read.
_VERSION = 2

# Element types that weights are compressed from.
_DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How one weight was stored.

    Attributes:
        codec: Name of the codec.
        params: Its parameters by name; empty when they were not told.
        mode: The mode asked for: "auto", "fused", "folded" or "decode".
        attributes: Attributes of the payload.
        tensors: Keys of the payload's own tensors.
        shared: Keys of its shared tensors.
    """

    codec: str
    params: Mapping[str, Any]
    mode: str
    attributes: Mapping[str, Attribute]
    tensors: Sequence[str]
    shared: Sequence[str]


@dataclasses.dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One compressed weight: where it was, without its uses, and how it is stored."""

    site: WeightSite
    recipe: Recipe


def own_name(site: str, key: str) -> str:
    """Name of the initializer that holds a weight's own tensor."""
    return f"{site}::{key}"


def shared_name(key: str) -> str:
    """Name of the initializer that holds a shared tensor or a constant."""
    return f"{DOMAIN}::{key}"


def read_manifest(model: ir.Model) -> dict[str, ManifestEntry]:
    """The compressed weights of a model by name; empty for a model that has none.

    Raises:
        ModelError: The entry is damaged or was written by a newer version.
    """
    text = model.metadata_props.get(KEY)
    if text is None:
        return {}
    try:
        document = json.loads(text)
        if document["version"] > _VERSION:
            raise ModelError(
                f"the model was compressed by a newer version (format {document['version']})",
                hint="update onnxcomp",
            )
        recipes = [_recipe(recipe) for recipe in document["recipes"]]
        return {name: _entry(name, values, recipes) for name, values in document["sites"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"the metadata entry {KEY!r} is damaged: {error}", hint="compress the model again"
        ) from error


def _recipe(values: Mapping[str, Any]) -> Recipe:
    recipe = Recipe(**values)
    kinds = {"codec": str, "params": dict, "mode": str, "attributes": dict}
    kinds |= {"tensors": list, "shared": list}
    for field, kind in kinds.items():
        if not isinstance(getattr(recipe, field), kind):
            raise TypeError(f"{field} is {getattr(recipe, field)!r}")
    if not all(isinstance(key, str) for key in (*recipe.tensors, *recipe.shared)):
        raise TypeError("the name of a tensor is not a string")
    return recipe


def _entry(name: str, values: Sequence[Any], recipes: Sequence[Recipe]) -> ManifestEntry:
    index, shape, dtype, rows, length, transposed, *stack = values
    experts = stack[0] if stack else 1
    sizes = (index, rows, length, experts, *shape)
    if not all(isinstance(size, int) for size in sizes) or not 0 <= index < len(recipes):
        raise TypeError(f"weight {name!r} is described by {values}")
    if min(rows, length, *shape) < 1 or rows * length != math.prod(shape) or dtype not in _DTYPES:
        raise ValueError(f"weight {name!r} cannot be {dtype} {shape} of {rows} rows of {length}")
    if len(stack) > 1 or (stack and (len(shape) != 3 or shape[0] != experts or rows % experts)):
        raise ValueError(f"weight {name!r} cannot be {stack} matrices of shape {shape}")
    site = WeightSite(
        name, tuple(shape), dtype, (), "", rows, length, bool(transposed), experts=experts
    )
    return ManifestEntry(site, recipes[index])


def write_manifest(model: ir.Model, manifest: Mapping[str, ManifestEntry]) -> None:
    """Set the metadata entry of a model; none when no weight is compressed."""
    if not manifest:
        model.metadata_props.pop(KEY, None)
        return
    recipes: list[dict[str, Any]] = []
    sites: dict[str, list[Any]] = {}
    for name, entry in manifest.items():
        recipe, site = dataclasses.asdict(entry.recipe), entry.site
        if recipe not in recipes:
            recipes.append(recipe)
        index = recipes.index(recipe)
        sites[name] = [index, site.shape, site.dtype, site.rows, site.length, site.transposed]
        if site.experts > 1:
            sites[name].append(site.experts)
    stacks = any(entry.site.experts > 1 for entry in manifest.values())
    document = {"version": _VERSION if stacks else 1, "recipes": recipes, "sites": sites}
    model.metadata_props[KEY] = json.dumps(document, separators=(",", ":"))


def compressed_tensors(model: ir.Model) -> frozenset[str]:
    """Names of the initializers that are parts of compressed weights; plain ones do not count."""
    names: set[str] = set()
    for site, entry in read_manifest(model).items():
        if entry.recipe.codec != "dense":
            names.update(own_name(site, key) for key in entry.recipe.tensors)
            names.update(shared_name(key) for key in entry.recipe.shared)
    return frozenset(names)
