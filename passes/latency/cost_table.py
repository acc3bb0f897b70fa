"""What products cost on this machine, by codec and bits per weight: measured once, then looked up.

The time of ``(m, length) x (length, rows)`` is taken to be a sum with coefficients that are not
negative: a constant, the weights that are read, the multiplications, and the activations that are
prepared. Times are those of one thread.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec
from onnxcomp.passes.weight import Array, Use, WeightSite

__all__ = ["CostTable", "cached_costs", "committed_costs", "costs_path", "machine", "measure_costs"]

VERSION = 2

# Extents (rows, length) and rows of activations that are measured.
_EXTENTS = ((128, 128), (512, 512), (384, 1536), (1536, 384), (1024, 1024))
_HEIGHTS = (1, 16, 128)

# Seconds of measuring one point, and runs of it at least.
_SECONDS, _RUNS = 0.02, 5

# Told what is measured next, and how much of the work is done.
Told = Callable[[str, int, int], None]


def _features(height: float, rows: float, length: float) -> list[float]:
    return [1.0, rows * length, height * rows * length, height * (rows + length)]


@dataclasses.dataclass(frozen=True, slots=True)
class CostTable:
    """Coefficients of times.

    Attributes:
        machine: What they were measured on.
        coefficients: By codec and bits; "dense" is the product in float32.
    """

    machine: Mapping[str, str]
    coefficients: Mapping[str, Sequence[float]]

    def seconds(self, key: str, height: int, rows: int, length: int) -> float | None:
        """Expected time of one product; None for a setting that was not measured."""
        if key not in self.coefficients:
            return None
        return float(np.dot(self.coefficients[key], _features(height, rows, length)))

    def added(
        self, codec: Codec, params: Params, site: WeightSite, heights: Sequence[int]
    ) -> float | None:
        """Expected seconds that products with a weight take longer than dense ones.

        Args:
            codec: The codec.
            params: Its settings.
            site: The weight.
            heights: Rows of activations of each product in one run of the model.
        """
        if "matmul" not in codec.kinds(site):
            return 0.0
        found = 0.0
        for height in heights:
            dense = self.seconds("dense", height, site.rows, site.length)
            key = codec.cost_key(params)
            if dense is None or (key is None and not codec.stock):
                return None
            # Factors of low rank are dense products that are smaller as their bytes are.
            share = codec.size(site, params) / site.nbytes
            own = (
                dense * share if key is None else self.seconds(key, height, site.rows, site.length)
            )
            if own is None:
                return None
            found += own - dense
        return found

    def to_json(self) -> dict[str, Any]:
        """The table as plain values."""
        return {"version": VERSION, **dataclasses.asdict(self)}


def machine() -> dict[str, str]:
    """What times depend on: the processor, ONNX Runtime and the operator library."""
    from onnxcomp.ops import library_path
    from onnxcomp.runtime.machine import current_isa, look
    from onnxcomp.runtime.session import import_runtime

    name = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        lines = listing.read_text(errors="replace").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    library = hashlib.sha256(Path(library_path()).read_bytes()).hexdigest()[:16]
    return {
        "processor": name,
        "isa": current_isa(look()),
        "onnxruntime": import_runtime().__version__,
        "library": library,
    }


def costs_path() -> Path:
    """The file of this machine's costs, in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return Path(root) / "onnxcomp" / f"costs-{name}.json"


def cached_costs() -> CostTable | None:
    """The table measured earlier on this machine; None where there is none that fits."""
    try:
        values = json.loads(costs_path().read_text(encoding="utf-8"))
        if values["version"] != VERSION or values["machine"] != machine():
            return None
        return CostTable(values["machine"], values["coefficients"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def committed_costs(target: str) -> CostTable | None:
    """What products cost on a machine of a class, measured for all; None where none was.

    Written there by benchmarks/cost_tables.py.
    """
    path = Path(__file__).with_name("tables") / f"{target}.json"
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return CostTable(values["machine"], values["coefficients"])


def measure_costs(told: Told | None = None, *, save: bool = True) -> CostTable:
    """Measure this machine; takes a minute or so.

    Args:
        told: Told about the progress.
        save: Whether the table is kept for later runs.

    Raises:
        RuntimeMissingError: ONNX Runtime or the operator library is missing.
    """
    work: dict[str, tuple[Codec, Params] | None] = {"dense": None}
    for codec in CODECS.values():
        for offered in reversed(codec.candidates(_site(1024, 1024)) if _is_offered(codec) else ()):
            for params in (offered, codec.targeted(offered, "avx2")):
                key = codec.cost_key(params)
                if key is not None:
                    work.setdefault(key, (codec, params))
    found = {}
    for number, (key, setting) in enumerate(work.items()):
        if told is not None:
            told(key, number, len(work))
        found[key] = _fitted(list(_measured(setting)))
    table = CostTable(machine(), found)
    if save:
        _store(table)
    return table


def _is_offered(codec: Codec) -> bool:
    """Whether plans take a codec without being asked to."""
    return codec.automatic or codec.rounds_inputs


def _store(table: CostTable) -> None:
    path = costs_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(table.to_json(), indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _fitted(points: Sequence[tuple[int, int, int, float]]) -> list[float]:
    """Coefficients, none of them negative, with the least squares of relative errors."""
    rows = np.array([np.array(_features(*point[:3])) / point[3] for point in points])
    scale = np.linalg.norm(rows, axis=0)
    system = rows / scale
    solution = np.zeros(system.shape[1])
    # Coordinate descent: four unknowns, and no need for a package.
    for _ in range(2000):
        for column in range(system.shape[1]):
            own = system[:, column]
            rest = 1.0 - system @ solution + own * solution[column]
            solution[column] = max(0.0, float(own @ rest))
    return [float(value) for value in solution / scale]


def _site(rows: int, length: int) -> WeightSite:
    use = Use("product", "MatMul", 1, "matmul")
    return WeightSite("w", (length, rows), "float32", (use,), "", rows, length, True)


def _measured(setting: tuple[Codec, Params] | None) -> Iterator[tuple[int, int, int, float]]:
    """Times of one setting: height, rows, length, seconds."""
    for rows, length in _EXTENTS:
        with tempfile.TemporaryDirectory() as folder:
            run = _product(setting, rows, length, Path(folder))
            for height in _HEIGHTS:
                yield height, rows, length, _timed(functools.partial(run, height))


def _product(
    setting: tuple[Codec, Params] | None, rows: int, length: int, folder: Path
) -> Callable[[int], Any]:
    """A function that runs one product with some rows of activations."""
    from onnxcomp.passes.ir.model import save
    from onnxcomp.passes.lowering.rewrite import Placement, precision_attributes, rewrite
    from onnxcomp.runtime.session import needs_library, open_session

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((length, rows), dtype=np.float32) / 32
    model = _product_model(weight)
    if setting is not None:
        codec, params = setting
        site = _site(rows, length)
        payload = codec.encode(site, np.ascontiguousarray(weight.T), params)
        fast = {**payload.attributes, **precision_attributes("int8")}
        payload = dataclasses.replace(payload, attributes=fast)
        rewrite(model, [Placement(site, codec, payload, params=params)])
    path = save(model, folder / "product.onnx").files[0]
    session = open_session(path, library=needs_library(path), threads=1)
    inputs = {h: rng.standard_normal((h, length), dtype=np.float32) for h in _HEIGHTS}

    def run(height: int) -> Any:
        return session.run(None, {"x": inputs[height]})

    return run


def _product_model(weight: Array) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    from onnxcomp.passes.ir.model import load

    length, rows = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", length])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", rows])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    return load(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def _timed(run: Callable[[], Any]) -> float:
    """Median processor time of a call by this thread, in seconds."""
    run()
    times: list[float] = []
    while len(times) < _RUNS or sum(times) < _SECONDS:
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return max(float(np.median(times)), 1e-7)
