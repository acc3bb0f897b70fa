"""What a recorder keeps of the runs it sees, without a command around it."""

import collections
import dataclasses
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.runtime.clients import recorder, recording


def test_every_run_is_as_likely_to_be_kept(tmp_path: Path) -> None:
    """Of one process, and of processes with different numbers of runs."""
    counts: collections.Counter[int] = collections.Counter()
    for seed in range(300):
        facts = {"inputs": [{"name": "x", "rank": 1}]}
        reservoirs = []
        for process, runs in enumerate((5, 40, 15)):
            folder = tmp_path / f"{seed}-{process}"
            model = recorder._Model(str(folder), facts, 6, f"{seed}-{process}")
            for run in range(runs):
                if model.wants():
                    if len(model.sizes) >= model.capacity:
                        model.drop()
                    name = f"{run}.npz"
                    (folder / name).touch()
                    model.sizes[name] = 1
            offset = (0, 5, 45)[process]
            kept = [Path(str(offset + int(Path(name).stem))) for name in model.sizes]
            reservoirs.append((runs, kept))
        drawn = recording._drawn(reservoirs, 6, random.Random(seed))
        assert len(set(drawn)) == 6
        counts.update(int(path.name) for path in drawn)
    # 300 draws of 6 of 60: 30 of each, standard deviation 5.2.
    assert all(abs(counts[run] - 30) < 25 for run in range(60))
    groups = [sum(counts[run] for run in part) for part in (range(5), range(5, 45), range(45, 60))]
    assert np.allclose(groups, [150, 1200, 450], atol=75)  # 4 standard deviations or more


def test_files_are_read_by_numpy_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    given: Mapping[str, Any] = {
        "file": np.arange(3),
        "a/b:0": np.float32(2),
        "args": np.ones((0, 2)),
    }
    recorder.write_npz(str(path), given.items())
    assert [one.name for one in tmp_path.iterdir()] == ["a.npz"]
    with np.load(path) as stored:
        found = dict(stored)
    assert list(found) == list(given)
    for name, array in given.items():
        np.testing.assert_array_equal(found[name], array)
    first = path.read_bytes()
    recorder.write_npz(str(path), given.items())
    assert path.read_bytes() == first


def test_facts_of_a_recording_are_json(tmp_path: Path) -> None:
    entry = recording.Recorded("m.onnx", Path("c.npz"), 3, 2, 8, {"a": ((1, 2),), "b": None}, {})
    assert json.loads(json.dumps(entry.to_json()))["shapes"] == {"a": [[1, 2]], "b": None}
    assert {field.name for field in dataclasses.fields(entry)} >= {"left_out", "runs"}
