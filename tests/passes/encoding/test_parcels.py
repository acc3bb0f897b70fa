"""Values whose arrays lie in a file."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnxcomp.passes.encoding import parcels
from onnxcomp.passes.encoding.parcels import Parcel

VALUES = [
    {"matrix": np.arange(12, dtype=np.float32).reshape(3, 4), "scalar": np.asarray(7), "text": "t"},
    {},
    {
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "cut": np.arange(20)[::3],
        "empty": np.zeros((0, 3), np.float16),
        "half": np.arange(5).astype(ml_dtypes.bfloat16),
        "flags": np.asarray([True, False]),
        "words": np.asarray(["a", None], object),
    },
    {"none": np.zeros((4, 0))},
]


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    parcel = Parcel.packed(tmp_path / "values", iter(VALUES))
    assert [path.name for path in tmp_path.iterdir()] == ["values"]
    found = parcel.opened()
    parcel.remove()  # what is mapped stays
    assert not list(tmp_path.iterdir())
    assert [value.keys() for value in found] == [value.keys() for value in VALUES]
    for value, wanted in zip(found, VALUES, strict=True):
        for name, array in wanted.items():
            if isinstance(array, np.ndarray):
                assert (value[name].dtype, value[name].shape) == (array.dtype, array.shape), name
                assert value[name].tolist() == array.tolist(), name
    with pytest.raises(ValueError, match="read-only"):
        found[0]["matrix"][0] = 1


def test_values_without_arrays_need_no_file(tmp_path: Path) -> None:
    parcel = Parcel.packed(tmp_path / "values", ["a", 3])
    parcel.remove()
    assert parcel.opened() == ["a", 3]


def test_files_that_are_gone_or_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcels, "_PAUSE", 0.0)
    folder = tmp_path / "folder"
    folder.mkdir()
    parcel = Parcel.packed(folder / "values", VALUES)
    (folder / "values").write_bytes((folder / "values").read_bytes()[:-1])
    with pytest.raises(OSError, match=r"not there .* or not whole"):
        parcel.opened()
    parcel.remove()
    with pytest.raises(OSError, match="not there"):
        parcel.opened()
    folder.rmdir()
    monkeypatch.setattr(parcels, "_PAUSE", 60.0)  # nobody waits for a run that has ended
    monkeypatch.setattr(parcels.time, "sleep", lambda _: pytest.fail("it waits"))
    with pytest.raises(OSError, match="not there"):
        parcel.opened()
