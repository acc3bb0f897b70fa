"""The compiler's native code, loaded through ctypes: the hyper codec's, and sums of moments.

The library is optional. Without it the numpy forms give the same bytes, only slower.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import os
import sys
from pathlib import Path

import numpy as np

from onnxcomp.errors import CompressionError, RuntimeMissingError
from onnxcomp.passes.codecs.hyper.format import LANES, GroupLayout
from onnxcomp.passes.codecs.hyper.metric import Metric
from onnxcomp.passes.codecs.hyper.structured import Code
from onnxcomp.passes.codecs.hyper.survivors import Prices
from onnxcomp.passes.codecs.hyper.viterbi import PASSES, out_of_range
from onnxcomp.passes.weight import Array

__all__ = [
    "ISAS",
    "MOMENTS_BLOCK",
    "add_moments",
    "available",
    "check",
    "hyper_decode",
    "hyper_encode",
    "hyper_feedback",
    "hyper_survivors",
    "library_path",
]

# Rows of second moments that are summed together.
MOMENTS_BLOCK = 192

_VERSION = 3
_ENVIRONMENT = "ONNXCOMP_ENCODERS_LIBRARY"
_FILES = {"win32": "onnxcomp_encoders.dll", "darwin": "libonnxcomp_encoders.dylib"}
_FILE = _FILES.get(sys.platform, "libonnxcomp_encoders.so")

# Instruction sets of the encoder by number; "auto" takes the best one of the machine.
ISAS = {"auto": -1, "baseline": 0, "avx2": 1, "avx512": 2}

# Forces an instruction set upon the operators, and upon "auto" here.
_FORCED = "ONNXCOMP_ISA"

# Steps of the search, one for each weight and state, in one call: less than a second, because
# signals are heard between calls only.
_STEPS_AT_ONCE = 1 << 31

# Weights of one call of the calibrated encoder, for the same reason.
_WEIGHTS_AT_ONCE = 1 << 20

_INVALID, _OUT_OF_RANGE, _NO_MEMORY = -1, -2, -3


def _isa(name: str) -> int:
    """Number of an instruction set."""
    forced = os.environ.get(_FORCED, "")
    return ISAS[forced if name == "auto" and forced in ISAS else name]


def library_path() -> Path | None:
    """Where the encoder library lies; None when it was not built.

    Raises:
        RuntimeMissingError: ONNXCOMP_ENCODERS_LIBRARY names a file that does not exist.
    """
    chosen = os.environ.get(_ENVIRONMENT)
    if chosen:
        if not Path(chosen).is_file():
            raise RuntimeMissingError(
                f"{_ENVIRONMENT}={chosen}: no such file",
                hint=f"build the target onnxcomp_encoders, or unset {_ENVIRONMENT}",
            )
        return Path(chosen)
    # Folders of packages installed from links are found through the package, not through __file__.
    installed = Path(str(importlib.resources.files("onnxcomp.passes.codecs.hyper"))) / _FILE
    return installed if installed.is_file() else None


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    """Load and check the library at `path`."""
    try:
        library = ctypes.CDLL(str(path))
        version = int(library.onnxcomp_encoders_version())
    except (OSError, AttributeError) as error:
        raise RuntimeMissingError(
            f"cannot load the encoder library {path}: {error}", hint="build onnxcomp again"
        ) from error
    if version != _VERSION:
        raise RuntimeMissingError(
            f"encoder library {path} has interface {version}, this package needs {_VERSION}",
            hint="build onnxcomp again",
        )
    i32, i64, f64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    source = (pointer, i64, i64, i64, i64)
    library.onnxcomp_hyper_encode.argtypes = (
        *(*source, i32, i32, i32, pointer, f64),
        *(i32, i32, i32, pointer, pointer),
    )
    library.onnxcomp_hyper_decode.argtypes = (
        *(pointer, pointer, pointer, i64, i64),
        *(i32, i32, i32, i32, pointer),
    )
    library.onnxcomp_hyper_survivors.argtypes = (
        *(pointer, pointer, pointer, pointer, pointer, i64),
        *(i32, i32, i32, i32, i32, pointer),
    )
    library.onnxcomp_hyper_feedback.argtypes = (
        *(pointer, i64, i64, i32, i32, i32, pointer, pointer),
        *(f64, i32, i32, i32, i32, pointer, pointer),
    )
    library.onnxcomp_add_moments.argtypes = (
        *(pointer, pointer, i64, i64, i64, i64, i64),
        *(i32, i32, i32, pointer),
    )
    return library


def check() -> None:
    """Load the encoder library.

    Raises:
        RuntimeMissingError: It is missing, cannot be loaded, or belongs to another version.
    """
    _library()


def available() -> bool:
    """Whether the encoder library can be used."""
    return library_path() is not None


def _library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise RuntimeMissingError(f"{_FILE} is missing", hint="build onnxcomp with a C++ compiler")
    return _load(path)


def _check(status: int, what: str) -> None:
    if status == _OUT_OF_RANGE:
        raise out_of_range()
    if status == _NO_MEMORY:
        raise CompressionError(f"{what}: out of memory", hint="use fewer threads")
    if status == _INVALID:
        raise CompressionError(f"{what}: this machine or these parameters are not supported")


def hyper_encode(
    weight: Array,
    geometry: GroupLayout,
    table: Array,
    spread: float,
    *,
    passes: int = PASSES,
    threads: int = 1,
    isa: str = "auto",
) -> tuple[Array, Array]:
    """Encode ``(rows, length)`` with the native encoder; any strides are read in place.

    Args:
        weight: float32 ``(rows, length)``, finite.
        geometry: Parameters and extent.
        table: int8 ``(2**state_bits,)``.
        spread: Root mean square of the targets, in table units, for the start scale.
        passes: Searches, at least 2: an open one, then closed ones with refitted scales.
        threads: Worker threads; the result does not depend on it.
        isa: A key of `ISAS`; the result does not depend on it.

    Returns:
        codes uint8 ``(P, G, D, 16, 4)`` and scales float16 ``(P, G, 16, 1)``.

    Raises:
        ModelError: A group is too large for a float16 scale.
        RuntimeMissingError: The library is not there.
    """
    weight = np.asarray(weight, np.float32)
    if any(stride % 4 for stride in weight.strides):
        weight = np.ascontiguousarray(weight)
    table = np.ascontiguousarray(table, np.int8)
    codes = np.empty(geometry.codes_shape, np.uint8)
    scales = np.empty(geometry.scales_shape, np.float16)
    row_stride, column_stride = (stride // 4 for stride in weight.strides)
    step = _rows_at_once(geometry)
    for start in range(0, geometry.rows, step):
        rows, panel = weight[start : start + step], start // LANES
        status = _library().onnxcomp_hyper_encode(
            *(rows.ctypes.data, len(rows), geometry.length, row_stride, column_stride),
            *(geometry.bits, geometry.state_bits, geometry.group, table.ctypes.data, spread),
            *(passes, threads, _isa(isa), codes[panel:].ctypes.data, scales[panel:].ctypes.data),
        )
        _check(status, "hyper encoder")
    return codes, scales


def _rows_at_once(geometry: GroupLayout) -> int:
    """Rows of one call, a multiple of the panel: rows are independent of each other."""
    weights = _STEPS_AT_ONCE >> geometry.state_bits
    return max(LANES, weights // max(1, geometry.length) // LANES * LANES)


def hyper_decode(
    codes: Array, scales: Array, table: Array, geometry: GroupLayout, *, threads: int = 1
) -> Array:
    """Decode with native code: float32 ``(rows, length)``, bit-equal to `hyper_format.decode`.

    Raises:
        RuntimeMissingError: The library is not there.
    """
    codes = np.ascontiguousarray(codes, np.uint8)
    scales = np.ascontiguousarray(scales, np.float16)
    table = np.ascontiguousarray(table, np.int8)
    if codes.shape != geometry.codes_shape or scales.shape != geometry.scales_shape:
        raise CompressionError(f"codes {codes.shape} and scales {scales.shape} do not fit")
    if table.shape != (1 << geometry.state_bits,):
        raise CompressionError(f"table {table.shape} does not fit {geometry.state_bits} state bits")
    result = np.empty((geometry.rows, geometry.length), np.float32)
    status = _library().onnxcomp_hyper_decode(
        *(codes.ctypes.data, scales.ctypes.data, table.ctypes.data),
        *(geometry.rows, geometry.length),
        *(geometry.bits, geometry.state_bits, geometry.group, threads, result.ctypes.data),
    )
    _check(status, "hyper decoder")
    return result


def hyper_survivors(
    targets: Array,
    stems: Array,
    prices: Prices,
    table: Array,
    bits: int,
    *,
    threads: int = 1,
    isa: str = "auto",
) -> Array:
    """`hyper_survivors.search` in native code, with equal states.

    Raises:
        RuntimeMissingError: The library is not there.
    """
    targets = np.ascontiguousarray(targets, np.float32)
    stems = np.ascontiguousarray(stems, np.int32)
    table = np.ascontiguousarray(table, np.int8)
    count, group = targets.shape
    path = np.empty((count, group), np.uint16)
    status = _library().onnxcomp_hyper_survivors(
        *(targets.ctypes.data, prices.pull.ctypes.data, prices.prices.ctypes.data),
        *(stems.ctypes.data, table.ctypes.data, count, bits, len(table).bit_length() - 1),
        *(group, threads, _isa(isa), path.ctypes.data),
    )
    _check(status, "hyper encoder")
    return path


def hyper_feedback(
    weight: Array,
    geometry: GroupLayout,
    metric: Metric,
    code: Code,
    *,
    sweeps: int,
    threads: int = 1,
    isa: str = "auto",
) -> tuple[Array, Array]:
    """Encode ``(rows, length)`` for given inputs, to the bytes of `feedback.encode`.

    Args:
        weight: float32 ``(rows, length)``, finite.
        geometry: Parameters and extent.
        metric: What errors cost.
        code: The table and how it is used.
        sweeps: Times that all groups are encoded again.
        threads: Worker threads; the result does not depend on it.
        isa: A key of `ISAS`; the result does not depend on it.

    Returns:
        codes uint8 ``(P, G, D, 16, 4)`` and scales float16 ``(P, G, 16, 1)``.

    Raises:
        ModelError: A group is too large for a float16 scale.
        RuntimeMissingError: The library is not there.
    """
    weight = np.ascontiguousarray(weight, np.float32)
    codes = np.empty(geometry.codes_shape, np.uint8)
    scales = np.empty(geometry.scales_shape, np.float16)
    arrays = (
        *(metric.moments, metric.behind, metric.inverse),
        *(metric.ahead, metric.alone, metric.pulls, metric.prices),
    )
    pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    step = max(LANES * threads, _WEIGHTS_AT_ONCE // geometry.length // LANES * LANES)
    for start in range(0, geometry.rows, step):
        rows, panel = weight[start : start + step], start // LANES
        status = _library().onnxcomp_hyper_feedback(
            *(rows.ctypes.data, len(rows), geometry.length),
            *(geometry.bits, geometry.state_bits, geometry.group, pointers),
            *(code.table.ctypes.data, code.spread, code.passes, sweeps, threads, _isa(isa)),
            *(codes[panel:].ctypes.data, scales[panel:].ctypes.data),
        )
        _check(status, "hyper encoder")
    return codes, scales


def add_moments(
    total: Array,
    a: Array,
    b: Array,
    *,
    lower: bool,
    rows: slice | None = None,
    threads: int = 1,
    isa: str = "auto",
) -> None:
    """Add ``a.T @ b`` to `total`: products are float32, their sums from 256 vectors on float64.

    Args:
        total: float64 ``(p, q)``, contiguous.
        a: float32 ``(n, p)``.
        b: float32 ``(n, q)``.
        lower: Whether values above the diagonal may be left out.
        rows: Rows of `total` that are wanted, from a multiple of `MOMENTS_BLOCK` on; None for all.
        threads: Worker threads; the result does not depend on it.
        isa: A key of `ISAS`; the result does not depend on it.

    Raises:
        RuntimeMissingError: The library is not there.
    """
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    status = _library().onnxcomp_add_moments(
        *(a.ctypes.data, b.ctypes.data, len(a), a.shape[1], b.shape[1]),
        *((0, a.shape[1]) if rows is None else (rows.start, rows.stop)),
        *(lower, threads, _isa(isa), total.ctypes.data),
    )
    _check(status, "moments")
