"""Weight sites for codec tests, and the two forms of the hyper encoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.weight import Need, Use, WeightSite

SiteMaker = Callable[..., WeightSite]

_OPERATORS: dict[Need, str] = {"matmul": "MatMul", "gather": "Gather", "dense": "Conv"}


def _site(rows: int, length: int, *, need: Need = "matmul", dtype: str = "float32") -> WeightSite:
    use = Use("node", _OPERATORS[need], 1, need)
    return WeightSite("w", (rows, length), dtype, (use,), "", rows, length, False)


@pytest.fixture(scope="session")
def make_site() -> SiteMaker:
    """make_site(rows, length, need=..., dtype=...) with one use."""
    return _site


@pytest.fixture
def native_library() -> None:
    """Skips where the encoder library was not built."""
    if not native.available():
        pytest.skip("the encoder library is not built: set ONNXCOMP_ENCODERS_LIBRARY")


@pytest.fixture(params=["native", "numpy"])
def encoder_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the codec: with the encoder library and without."""
    form = str(request.param)
    if form == "native" and not native.available():
        pytest.skip("the encoder library is not built: set ONNXCOMP_ENCODERS_LIBRARY")
    monkeypatch.setattr(native, "available", lambda: form == "native")
    return form
