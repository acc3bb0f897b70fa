"""A perceptron on digits of 8 x 8 pixels: trained with shared weights, and made to share."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxcomp

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from onnxcomp.models import export, share  # noqa: E402

TRAIN, EPOCHS, RATE = 8000, 15, 0.1


@pytest.fixture(scope="module")
def digits(data_folder: Path) -> tuple[Any, Any]:
    """Images ``(10000, 64)`` and labels: means of 3 x 3 pixels of MNIST's test set."""
    folder = data_folder / "eval" / "mnist"
    pixels = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    full = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)[:, 2:26, 2:26] / 255.0
    small = full.reshape(-1, 8, 3, 8, 3).mean((2, 4)).reshape(-1, 64).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(small))
    targets = np.frombuffer(labels, np.uint8).astype(np.int64)[order]
    return torch.from_numpy((small[order] - 0.13) / 0.31), torch.from_numpy(targets)


def perceptron() -> nn.Module:
    """64 - 256 - 256 - 10."""
    layers = (nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return nn.Sequential(*layers)


def train(model: nn.Module, images: Any, labels: Any, rate: float) -> None:
    """One cycle of SGD with Nesterov momentum."""
    optimizer = torch.optim.SGD(model.parameters(), rate, 0.9, nesterov=True, weight_decay=5e-4)
    steps = EPOCHS * -(-TRAIN // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(TRAIN).split(128):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()


def accuracy(model: nn.Module, images: Any, labels: Any) -> float:
    """Share of right answers on images that were not trained on."""
    with torch.no_grad():
        return float((model(images[TRAIN:]).argmax(1) == labels[TRAIN:]).double().mean())


@pytest.fixture(scope="module")
def trained(digits: tuple[Any, Any]) -> nn.Module:
    """The dense perceptron."""
    torch.manual_seed(0)
    model = perceptron()
    train(model, *digits, RATE)
    return model


def test_a_32nd_of_the_weights_is_within_one_and_a_half_points(
    digits: tuple[Any, Any], trained: nn.Module
) -> None:
    torch.manual_seed(0)
    model = share(perceptron(), 32)
    train(model, *digits, RATE * 32**0.5)
    assert accuracy(model, *digits) > accuracy(trained, *digits) - 0.015


def error(path: Path, digits: tuple[Any, Any], exact: Any) -> float:
    """Relative error of the logits of images that nothing was fitted to."""
    session = onnxcomp.InferenceSession(path)
    x = digits[0][TRAIN:].numpy()
    found = session.run(None, {session.get_inputs()[0].name: x})[0]
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.fixture(scope="module")
def dense(digits: tuple[Any, Any], trained: nn.Module, tmp_path_factory: Any) -> tuple[Path, Path]:
    """The trained model as ONNX, and inputs to fit to."""
    folder = tmp_path_factory.mktemp("digits")
    sizes = ({0: torch.export.Dim("n")},)
    export(trained.eval(), (digits[0][:2],), folder / "dense.onnx", dynamic_shapes=sizes)
    session = onnxcomp.InferenceSession(folder / "dense.onnx")
    np.savez(folder / "x.npz", **{session.get_inputs()[0].name: digits[0][:2000].numpy()})
    return folder / "dense.onnx", folder / "x.npz"


def test_matched_chunks_keep_the_logits_at_eight_times_fewer_bytes(
    digits: tuple[Any, Any], trained: nn.Module, dense: tuple[Path, Path], tmp_path: Path
) -> None:
    with torch.no_grad():
        exact = trained(digits[0][TRAIN:]).numpy()
    options: dict[str, Any] = {"method": "hash", "precision": "exact"}
    matched = ".*:method=hash,map=matched,chunk=4,compression=4,memory=int8"
    result = onnxcomp.optimize(
        dense[0], tmp_path / "matched.onnx", data=dense[1], set_=matched, **options
    )
    shared = [site for site in result.report.sites if site.method == "hash"]
    sizes = [sum(getattr(s, f"bytes_{when}") for s in shared) for when in ("before", "after")]
    assert len(shared) == 2 and sizes[0] / sizes[1] > 7.99
    assert error(tmp_path / "matched.onnx", digits, exact) <= 0.05
    means = ".*:method=hash,map=fold,compression=2,memory=int8,limit=1"
    onnxcomp.optimize(dense[0], tmp_path / "mean.onnx", set_=means, **options)
    assert error(tmp_path / "mean.onnx", digits, exact) > 0.5


def test_least_squares_of_the_inputs_rescue_what_the_mean_loses(
    digits: tuple[Any, Any], trained: nn.Module, dense: tuple[Path, Path], tmp_path: Path
) -> None:
    with torch.no_grad():
        exact = trained(digits[0][TRAIN:]).numpy()
    folded = ".*:method=hash,map=fold,compression=2,memory=float16"
    options: dict[str, Any] = {"method": "hash", "precision": "exact", "set_": folded}
    onnxcomp.optimize(dense[0], tmp_path / "fitted.onnx", data=dense[1], **options)
    assert error(tmp_path / "fitted.onnx", digits, exact) < 0.2
