"""One call of a torch module: its tensors with names, in and out, as arrays for ONNX Runtime.

Exporters flatten nested arguments and results into a list of tensors; the names here are those of
the list: the parameter of `forward` and the keys below it, joined by underscores. Tensors of a
cache have names of their own (see `caches`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import RuntimeMissingError, UsageError
from onnxcomp.models.caches import PAST, PRESENT, filled, is_cache, tensors_of

__all__ = [
    "Call",
    "as_arrays",
    "bind",
    "flatten",
    "for_inference",
    "import_torch",
    "named_leaves",
    "run",
    "unflatten",
]

Array = npt.NDArray[Any]


def import_torch() -> Any:
    """The module torch.

    Raises:
        RuntimeMissingError: It is not installed or cannot be loaded.
    """
    try:
        import torch
    except ImportError as error:
        raise RuntimeMissingError(
            f"torch cannot be imported: {error}", hint="pip install 'onnxcomp[torch]'"
        ) from error
    return torch


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one call of a module.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments, in the order of the parameters.
        inputs: The tensors in them by name, in the order in which exporters list them.
        paths: For each of them the parameter and the keys that lead to it.
        cached: Whether a cache in the result is wanted: one is given, or ``use_cache=True`` is.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: Mapping[str, Any]
    paths: Sequence[tuple[Any, ...]]
    cached: bool = False

    def copies(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with every tensor copied, for modules that change what they are given."""
        example = (self.args, dict(self.kwargs))
        args, kwargs = unflatten(example, [t.detach().clone() for t in flatten(example)])
        return args, kwargs

    def results(self, value: Any) -> list[tuple[str, tuple[Any, ...], Any]]:
        """Name, path and value of the tensors of a result; of a cache, what was computed for it."""
        found = named_leaves(value, cache=PRESENT if self.cached else None)
        given = [path for path in self.paths if "encoder" in path[1:]]
        # Keys and values of the encoder go through as they came.
        return [leaf for leaf in found if not (given and "encoder" in leaf[1][1:])]


def _pytree() -> Any:
    from torch.utils import _pytree

    return _pytree


def flatten(value: Any) -> list[Any]:
    """The tensors in nested containers and caches, in their order."""
    return [leaf for _, _, leaf in named_leaves(value)]


def unflatten(example: Any, tensors: Sequence[Any]) -> Any:
    """Containers and caches like those of an example, with other tensors in them."""
    torch, pytree, given = import_torch(), _pytree(), iter(tensors)

    def other(leaf: Any) -> Any:
        if is_cache(leaf):
            return filled(leaf, given)
        return next(given) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(other, example, is_leaf=is_cache)


def bind(module: Any, args: Any, kwargs: Mapping[str, Any] | None = None) -> Call:
    """Name the tensors of a call.

    Args:
        module: The torch module.
        args: Positional arguments; one that is not a tuple is the only one.
        kwargs: Keyword arguments.

    Raises:
        UsageError: The module's `forward` does not take these arguments.
    """
    args = args if isinstance(args, tuple) else (args,)
    kwargs = dict(kwargs or {})
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"{type(module).__name__}.forward does not take these arguments: {error}",
            hint="give args as a tuple, and keyword arguments as kwargs={...}",
        ) from error
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and name in arguments:
            arguments |= arguments.pop(name)
    found = named_leaves(arguments)
    return Call(
        args,
        {name: value for name, value in arguments.items() if name in kwargs},
        {name: leaf for name, _, leaf in found},
        [path for _, path, _ in found],
        kwargs.get("use_cache") is True or any(map(is_cache, arguments.values())),
    )


def named_leaves(
    value: Any, single: str = "output", *, cache: str | None = PAST
) -> list[tuple[str, tuple[Any, ...], Any]]:
    """Name, path and value of every tensor in nested containers.

    Args:
        value: The containers.
        single: Name of a lone tensor.
        cache: What names of a cache's tensors start with; None leaves caches out.
    """
    torch, pytree = import_torch(), _pytree()
    result = []
    for keys, leaf in pytree.tree_flatten_with_path(value, is_leaf=is_cache)[0]:
        path = tuple(_key(key) for key in keys)
        if isinstance(leaf, torch.Tensor):
            result.append(("_".join(map(str, path)) or single, path, leaf))
        elif cache is not None and is_cache(leaf):
            for below, tensor in tensors_of(leaf):
                name = ".".join(map(str, (cache, *below)))
                result.append((name, (*path, *below), tensor))
    return result


def _key(key: Any) -> Any:
    """What a step of a path says: a position, a key of a dict, or the name of a field."""
    for attribute in ("idx", "key", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)


def run(module: Any, call: Call) -> dict[str, Any]:
    """The tensors that a module returns, by name.

    Names are keys of dicts and fields of named tuples; ``output`` is a lone tensor, ``output_0``
    the first of several.

    Raises:
        UsageError: It does not return a tensor.
    """
    args, kwargs = call.copies()
    found = call.results(module(*args, **kwargs))
    if not found:
        raise UsageError(
            f"{type(module).__name__} does not return a tensor",
            hint="return tensors, or a tuple of them",
        )
    return {(f"output_{name}" if name[0].isdigit() else name): leaf for name, _, leaf in found}


def as_arrays(tensors: Mapping[str, Any]) -> dict[str, Array]:
    """Tensors as arrays on the host; bfloat16 becomes that of ml_dtypes."""
    return {name: _array(tensor) for name, tensor in tensors.items()}


def _array(tensor: Any) -> Array:
    torch = import_torch()
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        import ml_dtypes

        return np.asarray(plain.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    return np.asarray(plain.numpy())


@contextlib.contextmanager
def for_inference(module: Any) -> Iterator[None]:
    """Put a module into evaluation mode without gradients; every part gets its own mode back.

    The state of the random generators is as before, too. Attention runs in single steps: its
    fused form for inference has no counterpart in ONNX.
    """
    torch = import_torch()
    modes = [(part, part.training) for part in module.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        module.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for part, training in modes:
            part.training = training
