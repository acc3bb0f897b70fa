"""Golden files of the integer codec: bytes that every version must write and read alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxcomp.passes.codecs.integer.codec import IntegerCodec, IntegerParams
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.weight import Array, WeightSite

SiteMaker = Callable[..., WeightSite]

FILES = sorted((Path(__file__).parents[2] / "golden").glob("int_*.npz"))
CODEC = IntegerCodec()


def load(path: Path, make_site: SiteMaker) -> tuple[dict[str, Array], WeightSite, IntegerParams]:
    with np.load(path) as archive:
        golden = {name: archive[name] for name in archive.files}
    bits, block, zero_points, products = map(int, golden["settings"])
    need = "matmul" if products else "gather"
    site = make_site(*golden["weight"].shape, need=need)
    return golden, site, IntegerParams(bits, block, zero_points)


def test_there_are_files_for_every_form() -> None:
    assert len(FILES) == 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_weights_encode_and_decode_to_the_byte(path: Path, make_site: SiteMaker) -> None:
    golden, site, params = load(path, make_site)
    stored = {k.removeprefix("tensor_"): v for k, v in golden.items() if k.startswith("tensor_")}
    payload = CODEC.encode(site, golden["weight"], params)
    assert {k: v.tobytes() for k, v in payload.tensors.items()} == {
        k: v.tobytes() for k, v in stored.items()
    }
    read = Payload(stored, payload.shared, CODEC.attributes(site, params))
    assert CODEC.decode(site, read).tobytes() == golden["decoded"].tobytes()
