"""Tables of what calibration brings, from benchmarks/results/quality.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from page_parts import markdown, read, share

__all__ = ["calibration_steps", "deep_convolutions"]

# What `--data` does.
_DEFAULT = "scales tuned, 2 passes"

# Convolutional networks: name and bytes of the model, and steps with what they stand for.
_NETWORKS = {"mobilenetv2": ("MobileNetV2", 13_969_018), "squeezenet": ("SqueezeNet", 2_484_091)}
_DATA = {"by values": "none", "streams made up for": "62 images"}


def _row(row: dict[str, Any]) -> list[str]:
    agreement = (row["books_agreement"] + row["shakespeare_agreement"]) / 2
    size = f"{row['bytes'] / 1e6:.2f} MB"
    seconds = f"{row['cpu_seconds']:.0f}"
    return [str(row["bits"]), row["step"], size, f"{row['kl']:.4f}", share(agreement), seconds]


def calibration_steps() -> Iterator[str]:
    """What each step of calibration leaves of the loss of a small language model."""
    rows = read("quality")["language_model"]["rows"]
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
            if row["step"] in _DATA:
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
