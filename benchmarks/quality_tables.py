"""Tables of what calibration brings and of rivals, from benchmarks/results/quality.json."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from page_parts import markdown, read, share

__all__ = ["calibration_steps", "deep_convolutions", "other_models", "rivals"]

# Bytes of the models of `other_models`, and their steps with what they stand for.
_MINILM, _RESNET = 90_323_597, 1_092_222
_STEPS = {"by values": "no", "look-ups weighed": "yes, not tuned", "scales tuned, 2 passes": "yes"}

# What `--data` does.
_DEFAULT = "scales tuned, 2 passes"

# Convolutional networks: name and bytes of the model, and steps with what they stand for.
_NETWORKS = {"mobilenetv2": ("MobileNetV2", 13_969_018), "squeezenet": ("SqueezeNet", 2_484_091)}
_DATA = {"by values": "none", "streams made up for": "62 images"}
_SHOWN = {4: tuple(_DATA.values()), 3: ("none",)}


class _Model(NamedTuple):
    """How a model is told of: its name, and the key, name and digits of what it loses."""

    name: str
    loss: str
    words: str
    digits: int


_KL = ("kl", "KL")
_OTHER = ("disagreement", "other class")
_MODELS = {
    "language_model": _Model("language model", *_KL, 4),
    "smollm2": _Model("SmolLM2-135M", *_KL, 3),
    "minilm": _Model("MiniLM", "one_minus_cosine", "1 - cosine", 4),
    "mobilenetv2": _Model("MobileNetV2", *_OTHER, 3),
    "squeezenet": _Model("SqueezeNet", *_OTHER, 3),
    "resnet20": _Model("ResNet20", *_OTHER, 3),
    "silero": _Model("Silero VAD", *_KL, 4),
    "yolox": _Model("YOLOX-Nano", "missed", "missed boxes", 3),
}

# Steps that stand for the compiler, without inputs and with them, the best ones first; and rivals.
_OURS = {
    "onnxcomp": ("by values",),
    "onnxcomp, calibrated": (_DEFAULT, "look-ups weighed", "streams made up for"),
}
_RIVALS = {"RTN": "RTN", "k-quant": "k-quant", "HQQ": "HQQ", "GPTQ": "GPTQ, calibrated"}
_BITS = (4, 3, 2)

# Bytes and loss, by bits; plans for a size under numbers below 0.
_Curve = Mapping[int, tuple[int, float]]


def _row(row: dict[str, Any]) -> list[str]:
    agreement = (row["books_agreement"] + row["shakespeare_agreement"]) / 2
    size = f"{row['bytes'] / 1e6:.2f} MB"
    seconds = f"{row['cpu_seconds']:.0f}"
    return [str(row["bits"]), row["step"], size, f"{row['kl']:.4f}", share(agreement), seconds]


def calibration_steps() -> Iterator[str]:
    """What each step of calibration leaves of the loss of a small language model."""
    rows = [row for row in read("quality")["language_model"]["rows"] if row["step"] not in _RIVALS]
    order = {row["step"]: number for number, row in enumerate(rows)}
    rows = sorted(rows, key=lambda row: (-row["bits"], order[row["step"]]))
    yield (
        "The small language model below, calibrated on its training text (128 windows):\n"
        "divergence from the float32 predictions on held-out text of two kinds, and CPU seconds.\n"
        f'Each step includes those before it; "{_DEFAULT}" is what `--data` does\n'
        "(`benchmarks/bench_quality.py`).\n"
    )
    columns = ("bits", "step", "file", "KL (nats)", "same token", "CPU seconds")
    yield markdown(columns, [_row(row) for row in rows])


def deep_convolutions() -> Iterator[str]:
    """What rounding does to convolutional networks, without data and with some."""
    cells = []
    for key, (name, size) in _NETWORKS.items():
        for row in read("quality")[key]["rows"]:
            if row["step"] in _DATA and _DATA[row["step"]] in _SHOWN.get(row["bits"], ()):
                ratio = f"{row['bytes'] / 1e6:.2f} MB ({size / row['bytes']:.1f}x)"
                same = share(1 - row["disagreement"])
                seconds = f"{row['cpu_seconds']:.0f}"
                found = [name, str(row["bits"]), _DATA[row["step"]], ratio, same]
                cells.append([*found, f"{row['kl']:.3f}", seconds])
    yield (
        "On 428 photographs of ImageNet that were not calibrated with: as many get the dense\n"
        "model's class, divergence from its predictions, and CPU seconds of the compiler\n"
        "(`--tune 0`, `benchmarks/bench_quality.py`).\n"
    )
    columns = ("model", "bits", "data", "file", "same answers", "KL (nats)", "CPU seconds")
    yield markdown(columns, cells)


def _goal(row: dict[str, Any]) -> str:
    return f"{row['bits']} bits" if "bits" in row else f"`--ratio {row['ratio']}`"


def other_models() -> Iterator[str]:
    """What calibration brings a sentence encoder and a small residual network."""
    found = read("quality")
    encoder = found["minilm"]
    yield (
        f"The sentence encoder above, calibrated on sentences of {encoder['pairs']:,} training\n"
        "pairs of STS-B, none of which is in the development set, which it is judged by.\n"
        "ResNet20, calibrated on 1,000 training images of CIFAR-10 and judged by all 10,000 test\n"
        "images: points of accuracy that are lost, and how many images keep the dense model's\n"
        "class (`benchmarks/bench_quality.py`).\n"
    )
    cells = [
        [
            *(_goal(row), _STEPS[row["step"]], f"{row['bytes'] / 1e6:.2f} MB"),
            *(f"{_MINILM / row['bytes']:.2f}", f"{row['spearman']:.4f}"),
            *(f"{row['one_minus_cosine']:.4f}", f"{row['cpu_seconds']:.0f}"),
        ]
        for row in encoder["rows"]
        if row["step"] in _STEPS and row.get("bits") != 2
    ]
    columns = ("MiniLM", "data", "file", "ratio", "Spearman", "1 - cosine", "CPU seconds")
    yield markdown(columns, cells)
    cells = [
        [
            *(_goal(row), _STEPS[row["step"]], f"{row['bytes'] / 1e3:.0f} KB"),
            *(f"{_RESNET / row['bytes']:.2f}", f"{row['accuracy_drop']:.2f}"),
            *(share(row["agreement"]), f"{row['cpu_seconds']:.0f}"),
        ]
        for row in found["resnet20"]["rows"]
        if row["step"] in _STEPS and row.get("bits", 4) == 4
    ]
    columns = ("ResNet20", "data", "file", "ratio", "points lost", "same class", "CPU seconds")
    yield markdown(columns, cells)


def _curves(model: str) -> dict[str, _Curve]:
    """What every method makes of a model, as far as it was measured.

    Plans for a size count as bits of their own, which no column shows.
    """
    rows = read("quality")[model]["rows"]
    key = _MODELS[model].loss
    named = {(row["step"], row.get("bits", -row.get("ratio", 0))): row for row in rows}
    sizes = sorted({goal for _, goal in named} - set(_BITS))
    methods = {**_OURS, **{name: (step,) for step, name in _RIVALS.items()}}
    found: dict[str, dict[int, tuple[int, float]]] = {}
    for name, steps in methods.items():
        for bits in (*_BITS, *sizes):
            row = next((named[step, bits] for step in steps if (step, bits) in named), None)
            if row is not None:
                loss = row[key] if key in row else 1 - row["agreement"]
                found.setdefault(name, {})[bits] = row["bytes"], loss
    return found


def _at(curve: _Curve, size: int) -> float:
    """The loss at so many bytes: its logarithm is taken to be straight between two sizes."""
    points = sorted(curve.values())
    pairs = list(itertools.pairwise(points))
    (near, first), (far, last) = next((p for p in pairs if size <= p[1][0]), pairs[-1])
    if min(first, last) <= 0.0:
        return last if size >= far else first
    share_of = min(1.0, (size - near) / (far - near))
    return math.exp(math.log(first) + share_of * (math.log(last) - math.log(first)))


def _cell(model: _Model, found: tuple[int, float] | None) -> str:
    if found is None:
        return ""
    size, loss = found
    amount = f"{size / 1e6:.2f} MB" if size >= 1_000_000 else f"{size / 1e3:.0f} KB"
    return f"{amount}: {loss:.{model.digits}f}"


def _best_rival(curves: Mapping[str, _Curve], bits: int, data: bool) -> tuple[str, float] | None:
    """The best rival at so many bits, and how many times as much as ours it loses."""
    ours = curves.get("onnxcomp, calibrated" if data else "onnxcomp", {})
    able = [name for name in _RIVALS.values() if bits in curves.get(name, {})]
    able = [name for name in able if data or "calibrated" not in name]
    if len(ours) < 2 or not able:
        return None
    times = {
        name: curves[name][bits][1] / max(_at(ours, curves[name][bits][0]), 1e-9) for name in able
    }
    return min(times.items(), key=lambda item: item[1])


def _against(found: tuple[str, float] | None) -> str:
    if found is None:
        return ""
    name, times = found
    return f"{name.removesuffix(', calibrated')} {times:.2f}"


def _sentence(beaten: Sequence[tuple[str, int, str, bool]]) -> str:
    """Where a rival loses less."""
    if not beaten:
        return "No rival loses less at equal bytes in any of these cases.\n"
    told = [
        f"{rival} on {name} at {bits} bits {'with' if data else 'without'} data"
        for name, bits, rival, data in beaten
    ]
    return f"At equal bytes rivals lose less here: {'; '.join(told)}.\n"


def rivals() -> Iterator[str]:
    """All models by all methods by bits, and the best rival at equal bytes."""
    known = {key: model for key, model in _MODELS.items() if key in read("quality")}
    curves = {key: _curves(key) for key in known}
    yield (
        "Files and what they lose against the dense model, on inputs that nothing was calibrated\n"
        "with: divergence of predictions (KL), the share of images that get another class, or of\n"
        "boxes that are not found again. All methods store the same tensors, tables and filters\n"
        "too. Bytes of rivals are counted with packed codes, a float16 scale and a zero point\n"
        "for each block of 128 weights of a row, which is less than the operators of ONNX\n"
        "Runtime take (`benchmarks/bench_quality.py`).\n"
    )
    cells = [
        [f"{model.name}, {model.words}", name, *(_cell(model, curve.get(b)) for b in _BITS)]
        for key, model in known.items()
        for name, curve in curves[key].items()
    ]
    yield markdown(("model, loss", "method", *(f"{bits} bits" for bits in _BITS)), cells)
    yield (
        "The best rival, and how many times as much it loses as onnxcomp at the bytes of the\n"
        "rival, which are read off between the sizes above and those of plans for a size, or\n"
        "along the same line below the smallest of them; below 1 the rival is better. Without\n"
        "data, and with calibration inputs, where GPTQ takes part.\n"
    )
    table, beaten = [], []
    for key, model in known.items():
        found = [
            (b, data, _best_rival(curves[key], b, data)) for data in (False, True) for b in _BITS
        ]
        table.append([model.name, *(_against(best) for _, _, best in found)])
        beaten += [
            (model.name, bits, best[0].removesuffix(", calibrated"), data)
            for bits, data, best in found
            if best is not None and best[1] < 1.0
        ]
    columns = [f"{b} bits{', data' if data else ''}" for data in (False, True) for b in _BITS]
    yield markdown(("model", *columns), table)
    yield _sentence(beaten)
