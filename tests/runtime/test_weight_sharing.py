"""Sessions of one process that use one mapping of the weights."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import onnxcomp
from onnxcomp.errors import ModelError
from onnxcomp.runtime.weight_sharing import share_weights

MAPS = Path("/proc/self/smaps")


def resident(name: str) -> int:
    """Resident bytes of all mappings of a file, each counted."""
    total, ours = 0, False
    for line in MAPS.read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(name)
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture
def external(twins: tuple[Path, Path], tmp_path: Path) -> Path:
    path = tmp_path / "shared.onnx"
    onnx.save(onnx.load(twins[1]), path, save_as_external_data=True, location="shared.data",
              size_threshold=0)  # fmt: skip
    return path


def session(path: Path, *, shared: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    onnxcomp.register(options)
    if shared:
        assert share_weights(options, path) > 0
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.usefixtures("library")
@pytest.mark.skipif(not MAPS.exists(), reason="no /proc/self/smaps")
def test_sessions_that_share_map_the_file_once(external: Path) -> None:
    feed = {"ids": np.arange(10, dtype=np.int64).reshape(2, 5)}
    alone = session(external, shared=False)
    wanted = alone.run(None, feed)[0]
    del alone
    kept, sizes = [], []
    for _ in range(4):
        kept.append(session(external, shared=True))
        np.testing.assert_array_equal(kept[-1].run(None, feed)[0], wanted)
        sizes.append(resident("shared.data"))
    assert sizes[0] > 0 and len(set(sizes)) == 1
    first = kept.pop(0)
    del first  # the others still have their weights
    np.testing.assert_array_equal(kept[0].run(None, feed)[0], wanted)


def test_what_cannot_be_shared(twins: tuple[Path, Path], external: Path) -> None:
    options = onnxruntime.SessionOptions()
    with pytest.raises(ModelError, match="no external data to share") as caught:
        share_weights(options, twins[1])
    assert "--external-data always" in caught.value.hint
    data = external.with_name("shared.data")
    content = data.read_bytes()
    data.write_bytes(content[:100])
    with pytest.raises(ModelError, match="ends before the tensor"):
        share_weights(options, external)
    data.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        share_weights(options, external)
    external.write_bytes(external.read_bytes().replace(b"shared.data", b"../hared.da"))
    with pytest.raises(ModelError, match="outside its folder"):
        share_weights(options, external)
