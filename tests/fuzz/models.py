"""Feeds mutated models to the reader and the rewriter: only errors of onnxcomp may come out.

    python tests/fuzz/models.py [--count N] [--seed S] [--keep FOLDER]

Every case loads a model, plans its compression with all its weights (which rewrites a copy of the
graph), inspects it, or expands it. A case is found again by ``--count 1`` and its seed.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from onnx import helper, numpy_helper

import onnxcomp as oc
from onnxcomp.errors import CompressionError

# Seconds after which a case hangs.
HANG = 10

# Address space: a header alone must not make the process allocate what it announces.
MEMORY = 8 << 30

GRAPH = """
everything (int64[N] ids, bool go, float[1, 3, 8, 8] image)
        => (float[1, 32] logits, float[N, 12] side, float[1, 4, 6, 6] seen, float[N, 1, 32] mixed,
            float[3, N, 16] summed) {
    x = Gather <axis = 0> (emb, ids)
    h = MatMul (x, fc1)
    r = Relu (h)
    d = some.local.Twice (r, fc2)
    q = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (d, fc3, bias)
    side = If (go) <
        then_branch = yes () => (float[N, 12] a) { a = MatMul (x, outer) },
        else_branch = no () => (float[N, 12] b) { b = MatMul (x, own) }
    >
    axis = Constant <value_ints = [1]> ()
    s = Unsqueeze (q, axis)
    y, last, cell = LSTM <hidden_size = 16> (s, lstm_w, lstm_r)
    zero = Constant <value_ints = [0]> ()
    z = Squeeze (last, zero)
    turned = Transpose <perm = [1, 0]> (emb)
    logits = MatMul (z, turned)
    seen = Conv (image, kernel)
    last_axis = Constant <value_ints = [-1]> ()
    tuples = Unsqueeze (ids, last_axis)
    chosen = GatherND (stack, tuples)
    wide = Unsqueeze (x, axis)
    mixed = MatMul (wide, chosen)
    summed = Einsum <equation = "th,enh->etn"> (x, turned_stack)
}
"""
SHAPES = {
    "stack": (32, 16, 32), "turned_stack": (3, 16, 16),
    "emb": (32, 16), "fc1": (16, 32), "fc2": (32, 16), "fc3": (16, 16), "bias": (16,),
    "outer": (16, 12), "lstm_w": (1, 64, 16), "lstm_r": (1, 64, 16), "kernel": (4, 3, 3, 3),
}  # fmt: skip
TWICE = """
<opset_import: ["" : 17], domain: "some.local"> Twice (x, w) => (y) {
    m = Constant ()
    s = MatMul (x, w)
    p = MatMul (s, m)
    two = Constant <value_float = 2.0> ()
    y = Mul (p, two)
}
"""
ODD_INTEGERS = (0, 1, -1, 2, 3, 7, 17, 127, 128, 255, 1 << 20, 1 << 31, -(1 << 31), 1 << 40)
ODD_INTEGERS += ((1 << 63) - 1, -(1 << 63))
ODD_TEXT = ("", "\0", "x", "w", "../../etc/passwd", "/etc/passwd", "com.onnxcomp", "ai.onnx")
ODD_TEXT += ("MatMul", "HyperMatMul", "a" * 3000, "{}", "[1]", "-1", "9" * 30, "\x1b[31m")


def dense_model() -> onnx.ModelProto:
    """A small model with most of what the rewriter knows."""
    rng = np.random.default_rng(0)
    graph = onnx.parser.parse_graph(GRAPH)
    for name, shape in SHAPES.items():
        array = rng.standard_normal(shape).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(array, name))
    own = rng.standard_normal((16, 12)).astype(np.float16).astype(np.float32)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.g.name == "no":
                attribute.g.initializer.append(numpy_helper.from_array(own, "own"))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("some.local", 1)]
    function = onnx.parser.parse_function(TWICE)
    inner = numpy_helper.from_array(rng.standard_normal((16, 16)).astype(np.float32))
    function.node[0].attribute.append(helper.make_attribute("value", inner))
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=[function])
    model.metadata_props.add(key="author", value="tests")
    return model


def sources(folder: Path) -> list[bytes]:
    """The models that are mutated: dense and compressed, one file or two."""
    path, output = folder / "dense.onnx", folder / "model.onnx"
    path.write_bytes(dense_model().SerializeToString())
    found = [path.read_bytes()]
    for options in ({}, {"mode": "folded"}, {"external_data": "always"}):
        chosen: dict[str, Any] = {"min_size": 256, "set_": [".*:group=32"], **options}
        oc.optimize(path, output, verify=False, bits=3, **chosen)
        found.append(output.read_bytes())
    onnx.save(onnx.load(path), output, save_as_external_data=True, location="model.onnx.data",
              size_threshold=64)  # fmt: skip
    return [*found, output.read_bytes(), found[0]]


def messages(message: Any) -> Iterator[Any]:
    """A message and all messages in it."""
    yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if field.is_repeated else (value,):
                yield from messages(inner)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, double or drop some bytes."""
    if not data:
        return bytes([rng.randrange(256)])
    out = bytearray(data)
    start = rng.randrange(len(out))
    end = min(len(out), start + rng.choice((1, 1, 2, 8, 100)))
    match rng.randrange(5):
        case 0:
            out[start] ^= 1 << rng.randrange(8)
        case 1:
            del out[start:end]
        case 2:
            out[start:start] = out[start:end]
        case 3:
            del out[start:]
        case _:
            out[start:end] = rng.randbytes(end - start)
    return bytes(out)


def scalar(field: Any, value: Any, rng: random.Random, texts: list[str]) -> Any:
    """Another value of a plain field."""
    if field.type == FieldDescriptor.TYPE_BYTES:
        return mutate_bytes(value, rng)
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice(ODD_TEXT) if rng.random() < 0.5 else rng.choice(texts)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e38))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.choice(list(field.enum_type.values_by_number))
    if rng.random() < 0.5:
        return value + rng.choice((-1, 1, 7))
    return rng.choice(ODD_INTEGERS)


def mutate(model: onnx.ModelProto, rng: random.Random) -> None:
    """Change one thing in a model; what protobuf itself refuses stays as it is."""
    everything = list(messages(model))
    texts = [name for message in everything if isinstance(message, onnx.NodeProto)
             for name in (*message.input, *message.output, message.op_type)] or ["x"]  # fmt: skip
    message = rng.choice(everything)
    fields = message.ListFields()
    if not fields:
        return
    field, value = rng.choice(fields)
    try:
        if rng.random() < 0.1:
            message.ClearField(field.name)
        elif field.is_repeated:
            _mutate_repeated(field, value, rng, texts)
        elif field.type != FieldDescriptor.TYPE_MESSAGE:
            setattr(message, field.name, scalar(field, value, rng, texts))
    except (ValueError, TypeError, OverflowError):
        return


def _mutate_repeated(field: Any, value: Any, rng: random.Random, texts: list[str]) -> None:
    index = rng.randrange(len(value))
    is_message = field.type == FieldDescriptor.TYPE_MESSAGE
    match rng.randrange(4):
        case 0:
            del value[index]
        case 1 if is_message:
            value.add().CopyFrom(value[index])
        case 1:
            value.append(value[index])
        case 2:
            items = [item.SerializeToString() for item in value] if is_message else list(value)
            rng.shuffle(items)
            del value[:]
            for item in items:
                if is_message:
                    value.add().ParseFromString(item)
                else:
                    value.append(item)
        case _ if is_message:
            value[index].CopyFrom(rng.choice(value))
        case _:
            value[index] = scalar(field, value[index], rng, texts)


def case(data: bytes, rng: random.Random) -> bytes:
    """A mutated model."""
    if rng.random() < 0.3:
        for _ in range(rng.choice((1, 1, 3))):
            data = mutate_bytes(data, rng)
        return data
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        mutate(model, rng)
    return model.SerializeToString()


def _plan(path: Path) -> None:
    oc.plan(path, min_size=64, bits=3)


def _optimize(path: Path) -> None:
    oc.optimize(path, path.with_name("out.onnx"), min_size=64, bits=2, verify=False, jobs=1)


def _expand(path: Path) -> None:
    oc.expand(path, path.with_name("out.onnx"))


WORK: tuple[Callable[[Path], Any], ...] = (_plan, _optimize, _expand, oc.inspect)


class Hang(BaseException):
    """A case took longer than `HANG` seconds."""


def _hang(*_: object) -> None:
    raise Hang


class Fuzzer:
    """Runs cases and counts what they end in.

    Attributes:
        outcomes: How often each kind of end occurred.
        failures: Seed and description of every end that must not occur.
        slowest: Seconds of the slowest case.
    """

    def __init__(self, folder: Path, keep: Path | None = None) -> None:
        self._folder, self._keep = folder, keep
        self._sources = sources(folder)
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.failures: list[tuple[int, str]] = []
        self.slowest = 0.0

    def run(self, seed: int) -> None:
        """Run the case of a seed."""
        rng = random.Random(seed)
        path = self._folder / "model.onnx"
        path.write_bytes(case(rng.choice(self._sources), rng))
        work = rng.choice(WORK)
        start = time.monotonic()
        signal.alarm(HANG)
        try:
            work(path)
            self.outcomes["done"] += 1
        except CompressionError as error:
            self.outcomes[type(error).__name__] += 1
            if not error.message or type(error) is CompressionError:
                self._fail(seed, work, error, path)
        except (Exception, Hang) as error:
            self._fail(seed, work, error, path)
        finally:
            signal.alarm(0)
        self.slowest = max(self.slowest, time.monotonic() - start)
        left = {file.name for file in self._folder.iterdir()}
        left -= {"dense.onnx", "model.onnx", "model.onnx.data", "out.onnx", "out.onnx.data"}
        if left:
            self.failures.append((seed, f"left {sorted(left)}"))

    def _fail(
        self, seed: int, work: Callable[[Path], Any], error: BaseException, path: Path
    ) -> None:
        name = getattr(work, "__name__", "?").strip("_")
        self.outcomes["unexpected"] += 1
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "passes" in f.filename]
        root = error
        while (inner := root.__cause__ or root.__context__) is not None:
            root = inner
        text = f"{name}: {type(error).__name__} at {where[-1:]}: {root!r}"
        self.failures.append((seed, text[:300]))
        if self._keep is not None:
            (self._keep / f"{seed}.onnx").write_bytes(path.read_bytes())


def fuzz(count: int, seed: int, keep: Path | None = None, seconds: float = 1e9) -> Fuzzer:
    """Run cases in a temporary folder, at most that many and for that long."""
    signal.signal(signal.SIGALRM, _hang)
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        fuzzer = Fuzzer(Path(folder), keep)
        end = time.monotonic() + seconds
        for number in range(seed, seed + count):
            if time.monotonic() > end:
                break
            fuzzer.run(number)
    return fuzzer


def main() -> int:
    """Run from the command line and print figures as JSON; 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import logging

    logging.disable(logging.CRITICAL)
    fuzzer = fuzz(given.count, given.seed, given.keep, given.seconds)
    print(json.dumps({
        "cases": sum(fuzzer.outcomes.values()),
        "outcomes": dict(fuzzer.outcomes),
        "slowest_s": round(fuzzer.slowest, 3),
        "failures": fuzzer.failures[:50],
    }))  # fmt: skip
    return 1 if fuzzer.failures else 0


if __name__ == "__main__":
    sys.exit(main())
