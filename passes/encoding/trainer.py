"""The training that `distill` uses. It is given from outside: no pass imports a framework.

The package provides `onnxcomp.models.distilling.distill`, loaded when it is first needed. This file
imports nothing, so that providing a trainer costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from onnxcomp.errors import RuntimeMissingError

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from onnxcomp.passes.codecs.protocol import SharedValues
    from onnxcomp.passes.weight import Array, Feed

__all__ = ["Trainer", "provide", "trainer"]


class Trainer(Protocol):
    """Trains the values that weights share towards the outputs of the dense model."""

    def __call__(
        self,
        model: ir.Model,
        found: Sequence[SharedValues],
        feeds: Sequence[Feed],
        steps: int,
        stored: Callable[[int, Array], Array],
        *,
        fixed: Mapping[str, Array],
        seed: int = 0,
        folder: Path | None = None,
    ) -> tuple[list[Array], float, float]:
        """Train, and judge by inputs kept aside.

        Args:
            model: The canonical dense model; only read.
            found: Weights that share values.
            feeds: Inputs by name.
            steps: Steps of the optimizer.
            stored: What the values of the n-th weight become when they are stored.
            fixed: Values of other weights, where they are not the dense ones.
            seed: Seed of the order of inputs.
            folder: Where temporary files lie.

        Returns:
            New values, float32, for each weight; and the relative error of the outputs on the
            inputs kept aside, before and after.

        Raises:
            ModelError: The graph cannot be trained through.
        """
        ...


_loaders: list[Callable[[], Trainer]] = []


def provide(load: Callable[[], Trainer]) -> None:
    """Name the trainer to use, in the place of an earlier one.

    Args:
        load: Gives the trainer; called when one is needed. It may raise `ImportError`.
    """
    _loaders[:] = [load]


def trainer() -> Trainer:
    """The trainer to use.

    Raises:
        RuntimeMissingError: None was provided, or its framework is not installed.
    """
    hint = "pip install 'onnxcomp[torch]'"
    if not _loaders:
        raise RuntimeMissingError("distilling needs a trainer, and there is none", hint=hint)
    try:
        return _loaders[0]()
    except ImportError as error:
        raise RuntimeMissingError(f"distilling needs torch: {error}", hint=hint) from error
