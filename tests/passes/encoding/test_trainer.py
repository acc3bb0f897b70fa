"""Who trains what weights share is decided outside of the passes."""

from __future__ import annotations

import sys

import pytest

import onnxcomp
from onnxcomp.errors import RuntimeMissingError
from onnxcomp.passes.encoding import trainer as module


def test_the_package_provides_a_trainer_and_says_when_its_framework_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert onnxcomp.__version__
    monkeypatch.delitem(sys.modules, "onnxcomp.models.distilling", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeMissingError, match="distilling needs torch") as raised:
        module.trainer()
    assert raised.value.hint == "pip install 'onnxcomp[torch]'"


def test_another_trainer_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*args: object, **options: object) -> object:
        raise AssertionError

    monkeypatch.setattr(module, "_loaders", [])
    with pytest.raises(RuntimeMissingError, match="there is none"):
        module.trainer()
    module.provide(lambda: train)  # type: ignore[arg-type, return-value]
    assert module.trainer() is train
