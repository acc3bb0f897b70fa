"""Few bits for tables of embeddings: loss by how a table's bits are spread over its rows.

    python benchmarks/bench_tables.py --data FOLDER --minilm MINILM.onnx
        [--models minilm,language_model] [--windows 30]

FOLDER is laid out as for the other benchmarks. All other weights have 4 bits, found by values or
for the calibration inputs, with the table dense; then the table is put in as codes of 1 to 4 bits
leave it, found by values or for the curvature of the loss by its rows. Of tables with two numbers
of bits, some columns have the more bits, or some rows: those that calibration inputs look up most,
the first ones, those with the largest norms, or the smallest. Bytes are those of the file with the
dense table, without it, and of its codes; rows in an order of their own cost two bytes each more.
The language model's head, which is the same tensor, is a weight of its own here.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from judges import Judge, LanguageModel, SentenceModel
from onnx import numpy_helper
from results import print_table, write_results

import onnxcomp
from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.codecs.moments import with_weight_error
from onnxcomp.passes.encoding.look_ups import _evenly
from onnxcomp.passes.gradients.output_moments import look_up_moments
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.weight import Stats, WeightSite

Array = npt.NDArray[Any]

# Look-ups that a row is taken to have had without any.
PRIOR = 0.5

# Bits of the rows or columns that have more of them, and of the others.
PAIRS = ((2, 1), (3, 1), (3, 2), (4, 2), (4, 3))

# Shares of rows with more bits.
SHARES = (0.0625, 0.125, 0.25, 0.5)


@dataclasses.dataclass(frozen=True)
class Split:
    """How many bits the parts of a table have.

    Attributes:
        kind: What is split, and by what.
        parts: Bits and places, which are all rows (axis 0) or columns (axis 1) together.
        axis: Of the places.
        ordered: Whether parts are as they lie in the table.
    """

    kind: str
    parts: Sequence[tuple[int, Array]]
    axis: int = 0
    ordered: bool = True


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a model, whose rows are only looked up.

    Attributes:
        name: Of the initializer.
        weight: Its values, float32.
        counts: Look-ups of each row by the calibration inputs.
        curvature: Of the loss by rows.
    """

    name: str
    weight: Array
    counts: Array
    curvature: Array

    def splits(self) -> Iterator[Split]:
        """All ways to spread bits."""
        rows, length = self.weight.shape
        every = np.arange(rows)
        for bits in (4, 3, 2, 1):
            yield Split("one number of bits", [(bits, every)])
        for more, less in PAIRS[:2]:
            for first in range(128, length, 128):
                columns = np.arange(length)
                parts = [(more, columns[:first]), (less, columns[first:])]
                yield Split("columns", parts, 1)
        norms = np.linalg.norm(self.weight, axis=1)
        orders = {
            "rows by look-ups": np.argsort(-self.counts, kind="stable"),
            "rows by number": every,
            "rows by largest norm": np.argsort(-norms, kind="stable"),
            "rows by smallest norm": np.argsort(norms, kind="stable"),
        }
        for (kind, order), (more, less), share in itertools.product(orders.items(), PAIRS, SHARES):
            first = int(rows * share) // 32 * 32
            parts = [(more, np.sort(order[:first])), (less, np.sort(order[first:]))]
            yield Split(kind, parts, ordered=kind == "rows by number")

    def restored(self, split: Split, calibrated: bool) -> tuple[Array, int]:
        """The table as codes leave it, and their bytes."""
        found, size = np.empty_like(self.weight), 0
        for bits, places in split.parts:
            part = np.ascontiguousarray(np.take(self.weight, places, axis=split.axis))
            moments = self.curvature
            if split.axis == 1:
                moments = moments[np.ix_(places, places)]
            site = WeightSite("w", part.shape, "float32", (), "", *part.shape, False)
            values, stored = _coded(site, part, bits, moments if calibrated else None)
            size += stored
            if split.axis == 1:
                found[:, places] = values
            else:
                found[places] = values
        return found, size + (0 if split.ordered else 2 * len(found))


def _coded(site: WeightSite, part: Array, bits: int, moments: Array | None) -> tuple[Array, int]:
    """What the default codes restore, and their bytes."""
    codec, params = CODECS["hyper"], HyperParams(bits)
    if moments is None or codec.calibration is None:
        payload = codec.encode(site, part, params)
    else:
        gram = with_weight_error(moments, part).astype(np.float32)
        stats = Stats(site, tokens=8192, gram=gram, mean=np.zeros(site.length))
        payload = codec.calibration.encode(site, part, params, stats, threads=1)
    return codec.decode(site, payload), payload.nbytes


def table_of(judge: Judge, data: Path) -> Table:
    """The largest table of a model."""
    model = load(judge.model)
    canonicalize(model)
    feeds = judge.calibration(data)
    sites = [s for s in find_sites(model).sites if any(use.need == "gather" for use in s.uses)]
    site = max(sites, key=lambda s: s.size)
    (found,) = look_up_moments(model, [site], [_evenly(model, feeds)])
    proto = onnx.load(judge.model)
    nodes = [n for n in proto.graph.node if n.op_type == "Gather" and n.input[0] == site.name]
    if len(nodes) != 1:
        raise SystemExit(f"{site.name} is looked up {len(nodes)} times")
    (name,) = {value.name for value in proto.graph.input} & {"input_ids"}
    counts = sum(np.bincount(feed[name].reshape(-1), minlength=site.rows) for feed in feeds)
    values = {tensor.name: tensor for tensor in proto.graph.initializer}[site.name]
    weight = numpy_helper.to_array(values)
    return Table(site.name, weight, np.asarray(counts), found[site.name].moments)


def measure(name: str, judge: Judge, data: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of one model."""
    table, feeds = table_of(judge, data), judge.calibration(data)
    for calibrated in (False, True):
        path = folder / "rest.onnx"
        onnxcomp.optimize(
            judge.model,
            path,
            method="hyper",
            bits=4,
            exclude=[f"^{table.name}$"],
            data=feeds if calibrated else None,
            tune=0,
            verify=False,
            force=True,
        )
        rest = onnx.load(path)
        dense = next(t for t in rest.graph.initializer if t.name == table.name)
        size = path.stat().st_size - table.weight.nbytes
        base = {"model": name, "calibrated": calibrated}
        yield {**base, "kind": "dense table", "bytes": path.stat().st_size, **judge(path)}
        for split in table.splits():
            values, stored = table.restored(split, calibrated)
            dense.CopyFrom(numpy_helper.from_array(values, table.name))
            onnx.save(rest, folder / "form.onnx")
            bits = [bits for bits, _ in split.parts]
            yield {
                **base,
                "kind": split.kind,
                "bits": bits,
                "share": len(split.parts[0][1]) / table.weight.shape[split.axis],
                "table_bits": 8 * stored / table.weight.size,
                "bytes": size + stored,
                **judge(folder / "form.onnx"),
            }


def untied(path: Path, folder: Path) -> Path:
    """The language model with a head that differs from its table by the last bit of a value."""
    model = onnx.load(path)
    head = next(t for t in model.graph.initializer if list(t.dims) == [256, 2048])
    values = numpy_helper.to_array(head).copy()
    values[0, 0] = np.nextafter(values[0, 0], np.float32(np.inf))
    head.CopyFrom(numpy_helper.from_array(values, head.name))
    onnx.save(model, folder / "untied.onnx")
    return folder / "untied.onnx"


def judge_of(name: str, options: argparse.Namespace, work: Path) -> Judge:
    """The judge of one model."""
    if name == "minilm":
        return SentenceModel(options.minilm, options.data, every=options.every)
    folder = options.data / "lm"
    judge = LanguageModel(folder / "tinyllama_ref.onnx", folder, options.windows)
    judge.model = untied(judge.model, work)
    return judge


def show(name: str, loss: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one table."""
    print(f"\n{name}")
    cells = [
        [
            "yes" if row["calibrated"] else "no",
            *(row["kind"], " and ".join(map(str, row.get("bits", ())))),
            *(f"{row.get('share', 1):.3f}", f"{row.get('table_bits', 32):.2f}"),
            *(row["bytes"], f"{row[loss]:.5f}"),
        ]
        for row in rows
    ]
    columns = ("calibrated", "split", "bits", "share", "bits of the table", "bytes", loss)
    print_table(columns, cells)


def main() -> None:
    """Measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minilm", type=Path, required=True)
    parser.add_argument("--models", default="minilm,language_model")
    parser.add_argument("--windows", type=int, default=10, help="of each set of the language model")
    parser.add_argument("--every", type=int, default=3, help="one pair of sentences in so many")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            judge = judge_of(name, options, Path(folder))
            rows = list(measure(name, judge, options.data, Path(folder)))
        found[name] = {"loss": judge.loss, "rows": rows}
        show(name, judge.loss, rows)
    write_results("tables", found)


if __name__ == "__main__":
    main()
