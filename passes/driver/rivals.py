"""What a model could be instead: the integers of ONNX Runtime, and our codes, to be compared."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.errors import CompressionError
from onnxcomp.passes.config.values import Target
from onnxcomp.passes.driver.api import optimize
from onnxcomp.runtime.machine import current_isa, look, target_of

__all__ = ["DYNAMIC", "Rival", "block_integers", "dynamic_integers", "make_rivals"]

# Blocks of MatMulNBits: larger ones are faster and less accurate, as our groups are.
_BLOCK = 128

# Bits of our codes, and of MatMulNBits.
_CODES, _INTEGERS = (4, 3, 2), (4, 8)

DYNAMIC = "ONNX Runtime dynamic int8"


@dataclasses.dataclass(frozen=True, slots=True)
class Rival:
    """One form of a model.

    Attributes:
        name: What it is: "MatMulNBits int4".
        path: Its file; None where it could not be made.
        reason: Why not.
    """

    name: str
    path: Path | None
    reason: str = ""


def make_rivals(
    model: Path, folder: Path, *, feeds: Sequence[Mapping[str, Any]] | None = None
) -> list[Rival]:
    """Write other forms of a dense model into a folder.

    They are those that a user of ONNX Runtime would try: `quantize_dynamic` with int8 weights,
    MatMulNBits of 4 and 8 bits with blocks of 128 and int8 activations, and codes of 4, 3 and 2
    bits for this machine, all without calibration; and 4 bits with as many weights dense as keep
    the model as fast as it was.

    Args:
        model: The dense model.
        folder: Where to write.
        feeds: Inputs to be fast on; None to make some up.
    """
    return [_made(name, maker, model, folder) for name, maker in _makers({"data": feeds}).items()]


Maker = Callable[[Path, Path], None]


def _makers(inputs: Mapping[str, Any]) -> dict[str, Maker]:
    target: Target = target_of(current_isa(look())) or "any"

    def codes(bits: int, **more: Any) -> Maker:
        def make(model: Path, path: Path) -> None:
            optimize(model, path, bits=bits, target=target, verify=False, **more)

        return make

    def integers(bits: int) -> Maker:
        return lambda model, path: block_integers(model, path, bits)

    found: dict[str, Maker] = {DYNAMIC: dynamic_integers}
    found |= {f"MatMulNBits int{bits}": integers(bits) for bits in _INTEGERS}
    found |= {f"onnxcomp, {bits} bits": codes(bits) for bits in _CODES}
    fast = codes(4, max_slowdown=1.0, calibration="off", force=True, **inputs)
    return {**found, "onnxcomp, 4 bits, as fast": fast}


def _made(name: str, maker: Maker, model: Path, folder: Path) -> Rival:
    path = folder / f"{name.replace(', ', '-').replace(' ', '-').lower()}.onnx"
    try:
        maker(model, path)
    except (CompressionError, ImportError, RuntimeError, ValueError) as error:
        text = error.message if isinstance(error, CompressionError) else str(error)
        return Rival(name, None, " ".join(text.split()))
    return Rival(name, path)


def _refuse_unchanged(model: Path, path: Path) -> None:
    """Raise where a quantizer found nothing to do: its row would be the dense model's."""
    if _operators(path) == _operators(model):
        path.unlink()
        raise ValueError("it leaves this model as it is")


def _operators(model: Path) -> collections.Counter[str]:
    """How often each operator is there, subgraphs included."""
    from onnxcomp.runtime.structure import nested_nodes, read_structure

    nodes = nested_nodes(read_structure(model).graph.node)
    return collections.Counter(node.op_type for node in nodes)


@contextlib.contextmanager
def _errors_only(name: str | None) -> Iterator[None]:
    """Keep advice of a quantizer out of the terminal; the logger is as before afterwards."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def dynamic_integers(model: Path, path: Path) -> None:
    """Write the model with int8 weights, and activations that are rounded at every run."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _errors_only(None):  # it advises on the root logger
        quantize_dynamic(
            model, path, weight_type=QuantType.QInt8, use_external_data_format=_is_large(model)
        )
    _refuse_unchanged(model, path)


def block_integers(model: Path, path: Path, bits: int) -> None:
    """Write the model with MatMulNBits: integers in blocks, symmetric; look-ups stay dense."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(model), bits=bits, block_size=_BLOCK, is_symmetric=True, accuracy_level=4
    )
    with _errors_only(MatMulNBitsQuantizer.__module__):
        quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=_is_large(model))
    _refuse_unchanged(model, path)


def _is_large(model: Path) -> bool:
    """Whether a file of protobuf could not hold the model."""
    from onnxcomp.runtime.structure import model_bytes

    return model_bytes(model) > 1 << 30
