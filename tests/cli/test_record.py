"""`onnxcomp record`: what applications feed their sessions, however they end."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcomp.runtime.stored_inputs import SETS, load_inputs

Write = Callable[[str], Any]
Run = Callable[..., Any]

# Runs the model of its first argument on ids that tell one run from the other.
TEN = """
    import sys
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(sys.argv[1])
    for number in range(10):
        session.run(None, {"ids": np.full((2, 3), number)})
"""


def model_of(path: Path, **inputs: tuple[int, list[Any] | None]) -> Path:
    """A model that gives back each of its inputs."""
    nodes = [helper.make_node("Identity", [name], [f"out_{name}"]) for name in inputs]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
        [helper.make_tensor_value_info(f"out_{name}", *value) for name, value in inputs.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as loaded:
        return dict(loaded)


def names(folder: Path) -> list[str]:
    """Files that a recording may have written, hidden ones included."""
    return sorted(path.name for path in folder.iterdir() if path.name != "application.py")


def test_what_an_application_feeds_is_data_for_the_compiler(
    application: Write, onnxcomp: Run, small_model: Path, tmp_path: Path
) -> None:
    run = application(TEN)
    answer = run(small_model, by=("record", "-o", "calib.npz"))
    assert (answer.returncode, answer.stdout) == (0, "")
    assert answer.stderr.splitlines()[-1] == "recorded for --data: calib.npz"
    assert names(tmp_path) == ["calib.npz"]
    (stored,) = arrays(tmp_path / "calib.npz").items()
    assert stored[0] == "ids" and stored[1].shape == (10, 2, 3)
    assert stored[1][:, 0, 0].tolist() == list(range(10))
    small = tmp_path / "small.onnx"
    made = onnxcomp(
        "optimize", small_model, "-o", small, "--data", tmp_path / "calib.npz", "--json"
    )
    assert made.code == 0, made.err
    assert made.json["verify"]["passed"]
    assert (
        any("calibrat" in site["note"] + site["reason"] for site in made.json["sites"])
        or (made.json["config"]["data"])
    )


def test_two_models_and_shapes_that_vary_survive_a_killed_child(
    application: Write, onnxcomp: Run, small_model: Path, tmp_path: Path
) -> None:
    other = model_of(tmp_path / "models" / "other.onnx", x=(TensorProto.FLOAT, ["n", "m"]))
    run = application("""
        import os, signal, subprocess, sys
        import numpy as np
        import onnxruntime

        if sys.argv[3:]:
            inputs = (("ids", np.int64), ("x", np.float32))
            for path, (name, kind) in zip(sys.argv[1:], inputs):
                session = onnxruntime.InferenceSession(path)
                for number in range(6):
                    session.run(None, {name: np.full((1, 3 + number % 2), number, kind)})
            os.kill(os.getpid(), signal.SIGKILL)
        child = subprocess.run([sys.executable, *sys.argv, "child"])
        sys.exit(-child.returncode)
    """)
    answer = run(small_model, other, by=("record", "-o", "calib.npz"))
    assert answer.returncode == signal.SIGKILL
    assert "the command ended with 9" in answer.stderr
    assert names(tmp_path) == ["calib-other.npz", "calib-perceptron.npz", "models"]
    found = arrays(tmp_path / "calib-perceptron.npz")
    assert found[SETS] == 2
    assert found["0/ids"].shape == (3, 1, 3) and found["1/ids"].shape == (3, 1, 4)
    feeds = load_inputs(tmp_path / "calib-other.npz", other)
    assert [feed["x"][0, 0] for feed in feeds] == [0, 2, 4, 1, 3, 5]
    assert {feed["x"].shape for feed in feeds} == {(1, 3), (1, 4)}
    data = tmp_path / "calib-perceptron.npz"
    made = onnxcomp("optimize", small_model, "-o", tmp_path / "small.onnx", "--data", data)
    assert made.code == 0, made.err


def test_every_way_to_run_a_session_is_recorded(application: Write, tmp_path: Path) -> None:
    model = model_of(tmp_path / "m.onnx", x=(TensorProto.FLOAT, ["n"]))
    run = application("""
        import sys, threading
        import numpy as np
        import onnxruntime as ort

        def value(number):
            return np.full(2, number, np.float32)

        session = ort.InferenceSession(path_or_bytes=sys.argv[1])
        session.run(["out_x"], {"x": value(0)})
        session.run(output_names=None, input_feed={"x": value(1)})
        session.run(None, {"x": [2.0, 2.0]})
        session.run_with_ort_values(None, {"x": ort.OrtValue.ortvalue_from_numpy(value(3))})
        done = threading.Event()
        session.run_async(None, {"x": value(4)}, lambda *_: done.set(), None)
        done.wait()
        binding = session.io_binding()
        binding.bind_output("out_x")
        array = value(5)
        binding.bind_cpu_input("x", array)
        session.run_with_iobinding(binding)
        array[:] = 6  # the same memory, other values
        session.run_with_iobinding(binding)
        binding.clear_binding_inputs()
        binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(value(7)))
        session.run_with_iobinding(binding)
        array[:] = 8
        binding.bind_input("x", "cpu", 0, np.float32, [2], array.ctypes.data)
        session.run_with_iobinding(iobinding=binding)
        assert binding.copy_outputs_to_cpu()[0].tolist() == [8, 8]
    """)
    answer = run(model, by=("record", "-o", "calib.npz"))
    assert answer.returncode == 0, answer.stderr
    assert arrays(tmp_path / "calib.npz")["x"][:, 1].tolist() == list(range(9))


def test_inputs_that_are_overwritten_by_the_run_are_those_before_it(
    application: Write, tmp_path: Path
) -> None:
    model = model_of(tmp_path / "m.onnx", x=(TensorProto.FLOAT, ["n"]))
    run = application("""
        import sys
        import numpy as np
        import onnxruntime

        session = onnxruntime.InferenceSession(sys.argv[1])
        array = np.zeros(2, np.float32)
        for number in range(3):
            session.run(None, {"x": array})
            array += 1
    """)
    assert run(model, by=("record", "-o", "calib.npz")).returncode == 0
    assert arrays(tmp_path / "calib.npz")["x"][:, 0].tolist() == [0, 1, 2]


def test_types_come_as_the_reader_takes_them(application: Write, tmp_path: Path) -> None:
    model = model_of(
        tmp_path / "m.onnx",
        flag=(TensorProto.BOOL, []),
        half=(TensorProto.FLOAT16, ["n"]),
        brain=(TensorProto.BFLOAT16, ["n"]),
        free=(TensorProto.FLOAT, None),
    )
    run = application("""
        import sys
        import numpy as np
        import onnxruntime as ort

        session = ort.InferenceSession(sys.argv[1])
        feed = {
            "flag": np.array(True), "half": np.ones(2, np.float16),
            "free": np.zeros((1, 2, 3), np.float32),
        }
        values = {k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in feed.items()}
        bits = np.array([0x3F80, 0xC000], np.uint16)
        values["brain"] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
        session.run_with_ort_values(None, values)
        session.run_with_ort_values(None, values)
    """)
    answer = run(model, by=("record", "-o", "calib.npz"))
    assert answer.returncode == 0, answer.stderr
    feeds = load_inputs(tmp_path / "calib.npz", model)
    assert [feed["free"].shape for feed in feeds] == [(1, 2, 3)] * 2
    assert feeds[1]["brain"].astype(np.float32).tolist() == [1, -2]
    assert (feeds[1]["flag"].shape, feeds[1]["half"].dtype) == ((), np.float16)


def test_text_is_text_again(application: Write, tmp_path: Path) -> None:
    model = model_of(tmp_path / "m.onnx", text=(TensorProto.STRING, ["n"]))
    run = application("""
        import sys
        import numpy as np
        import onnxruntime

        session = onnxruntime.InferenceSession(sys.argv[1])
        session.run(None, {"text": np.array(["a", "bc"], object)})
        session.run(None, {"text": np.array(["longer", ""])})
    """)
    answer = run(model, by=("record", "-o", "calib.npz"))
    assert answer.returncode == 0, answer.stderr
    feeds = load_inputs(tmp_path / "calib.npz", model)
    assert [feed["text"].tolist() for feed in feeds] == [["a", "bc"], ["longer", ""]]


def test_models_from_memory_and_of_one_name_have_files_of_their_own(
    application: Write, tmp_path: Path
) -> None:
    paths = [
        model_of(tmp_path / folder / "model.onnx", x=(TensorProto.FLOAT, ["n"]))
        for folder in ("one", "two", "three/two")
    ]
    run = application("""
        import sys
        import numpy as np
        import onnxruntime

        for number, path in enumerate(sys.argv[1:]):
            session = onnxruntime.InferenceSession(path)
            again = onnxruntime.InferenceSession(path)
            for each in (session, again):
                each.run(None, {"x": np.full(1, number, np.float32)})
        content = open(path, "rb").read()
        onnxruntime.InferenceSession(content).run(None, {"x": np.zeros(5, np.float32)})
    """)
    answer = run(*paths, by=("record", "-o", "calib.npz", "--json"))
    models = json.loads(answer.stdout)["models"]
    assert [model["model"] for model in models[:3]] == [str(path) for path in paths]
    files = [Path(model["path"]).name for model in models]
    assert files[:3] == ["calib-one-model.npz", "calib-two-model.npz", "calib-two-model-2.npz"]
    assert files[3] == f"calib-model-{models[3]['model'][:8]}.npz"
    assert [model["runs"] for model in models] == [2, 2, 2, 1]
    assert set(files) <= set(names(tmp_path))


def test_json_is_all_that_stdout_has(application: Write, small_model: Path, tmp_path: Path) -> None:
    run = application(TEN + '\n    print("from the application")\n    sys.exit(3)')
    answer = run(small_model, by=("record", "-o", "calib.npz", "--json", "--samples", 4))
    assert answer.returncode == 3
    document = json.loads(answer.stdout)
    assert "from the application" in answer.stderr
    assert document["exit_code"] == 3 and document["seconds"] > 0
    (model,) = document["models"]
    assert model["shapes"] == {"ids": [[2, 2], [3, 3]]}
    assert (model["runs"], model["samples"], model["bytes"]) == (10, 4, 4 * 2 * 3 * 8)
    assert model["left_out"] == {}


def test_samples_are_those_of_the_seed(
    application: Write, small_model: Path, tmp_path: Path
) -> None:
    run = application(TEN)
    contents = []
    for number, seed in enumerate((0, 0, 1)):
        output = f"{number}.npz"
        options = ("record", "-o", output, "--samples", 4, "--seed", seed)
        assert run(small_model, by=options).returncode == 0
        contents.append((tmp_path / output).read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_the_limit_is_kept_and_every_model_has_its_share(
    application: Write, small_model: Path, tmp_path: Path
) -> None:
    large = model_of(tmp_path / "large.onnx", x=(TensorProto.FLOAT, ["n"]))
    run = application(
        TEN
        + """
    large = onnxruntime.InferenceSession(sys.argv[2])
    for size in (2000, 200, 200, 200, 200):
        large.run(None, {"x": np.zeros(size, np.float32)})
    """
    )
    options = ("record", "-o", "calib.npz", "--json", "--max-bytes", "2KB")
    models = json.loads(run(small_model, large, by=options).stdout)["models"]
    small, big = sorted(models, key=lambda model: model["runs"], reverse=True)
    assert small["bytes"] + big["bytes"] <= 2000
    assert small["samples"] >= 1 and big["samples"] in (1, 2)
    assert big["left_out"] == {"large": 1}
    answer = run(small_model, large, by=("record", "-o", "a.npz", "--max-bytes", 10))
    assert answer.returncode == 2
    assert "larger than --max-bytes leaves room for" in answer.stderr


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_an_application_are_put_together(
    method: str, application: Write, small_model: Path, tmp_path: Path
) -> None:
    run = application(f"""
        import multiprocessing, sys
        import numpy as np
        import onnxruntime

        def work(path, numbers):
            session = onnxruntime.InferenceSession(path)
            for number in numbers:
                session.run(None, {{"ids": np.full((1, 1), number)}})

        if __name__ == "__main__":
            work(sys.argv[1], [0])
            start = multiprocessing.get_context({method!r})
            for first in (1, 11):
                child = start.Process(target=work, args=(sys.argv[1], range(first, first + 10)))
                child.start()
                child.join()
    """)
    answer = run(small_model, by=("record", "-o", "all.npz"))
    assert answer.returncode == 0, answer.stderr
    assert arrays(tmp_path / "all.npz")["ids"].ravel().tolist() == list(range(21))
    answer = run(small_model, by=("record", "-o", "some.npz", "--samples", 7, "--json"))
    (model,) = json.loads(answer.stdout)["models"]
    assert (model["runs"], model["samples"]) == (21, 7)


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("os.abort()", 134, "signal 6 ended it"),
        ("raise RuntimeError", 1, "the command ended with 1"),
        ("os._exit(5)", 5, "the command ended with 5"),
        ("os.kill(os.getpid(), 9)", 137, "signal 9 ended it"),
    ],
)
def test_however_the_command_ends_what_was_seen_is_kept(
    end: str, code: int, words: str, application: Write, small_model: Path, tmp_path: Path
) -> None:
    run = application(TEN + f"\n    import os\n    {end}")
    answer = run(small_model, by=("record", "-o", "calib.npz"))
    assert answer.returncode == code
    assert answer.stderr.splitlines()[-1] == f"recorded for --data: calib.npz; {words}"
    assert len(arrays(tmp_path / "calib.npz")["ids"]) == 10
    assert names(tmp_path) == ["calib.npz"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_command_and_the_recording_is_written(
    number: int, application: Write, small_model: Path, tmp_path: Path
) -> None:
    run = application(
        TEN
        + """
    import signal, time

    def seen(number, frame):
        print("seen", number, flush=True)
        sys.exit(7)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, seen)
    print("ready", flush=True)
    time.sleep(60)
    """
    )
    command = run.command(small_model, by=("record", "-o", "calib.npz"))
    with subprocess.Popen(
        command, cwd=tmp_path, env=run.environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (7, f"seen {number}\n")
    assert names(tmp_path) == ["calib.npz"]


def test_errors_of_the_application_stay_its_own(
    application: Write, small_model: Path, tmp_path: Path
) -> None:
    run = application(
        TEN
        + """
    for feed in ({"ids": np.zeros((1, 1), np.float32)}, {"ids": np.full((1, 1), 10**6)}, {}, None):
        try:
            session.run(None, feed)
        except Exception as error:
            print(type(error).__name__)
    try:
        session.run()
    except TypeError as error:
        print("TypeError")
    """
    )
    alone = subprocess.run(
        run.command(small_model)[5:], env=run.environment(), capture_output=True, text=True
    )
    answer = run(small_model, by=("record", "-o", "calib.npz"))
    assert answer.stdout == alone.stdout != ""
    assert len(arrays(tmp_path / "calib.npz")["ids"]) == 10


def test_a_recording_that_cannot_be_stored_ends_with_a_warning(
    application: Write, small_model: Path, tmp_path: Path
) -> None:
    run = application(
        TEN.replace(
            "session.run",
            """import os
        if number == 5:
            import shutil
            shutil.rmtree(next(name for name in os.listdir() if name.startswith(".calib")))
        session.run""",
        )
        + '\n    print("done")'
    )
    answer = run(small_model, by=("record", "-o", "calib.npz"))
    assert answer.stdout == "done\n"
    assert answer.stderr.count("warning: recording has ended") == 1


def test_a_process_that_outlives_the_command_leaves_nothing_behind(
    application: Write, small_model: Path, tmp_path: Path
) -> None:
    run = application("""
        import os, subprocess, sys, time
        import numpy as np
        import onnxruntime

        session = onnxruntime.InferenceSession(sys.argv[1])
        if sys.argv[2:]:
            while not os.path.exists("calib.npz"):
                time.sleep(0.05)
            time.sleep(0.3)
            open("late", "w").close()
        session.run(None, {"ids": np.zeros((1, 1), np.int64)})
        if not sys.argv[2:]:
            silent = {"stdout": subprocess.DEVNULL, "stderr": open("said", "w")}
            subprocess.Popen([sys.executable, *sys.argv, "child"], **silent)
        else:
            open("done", "w").close()
    """)
    assert run(small_model, by=("record", "-o", "calib.npz")).returncode == 0
    deadline = time.monotonic() + 120
    while not (tmp_path / "done").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert names(tmp_path) == ["calib.npz", "done", "late", "said"]
    assert "recording has ended: FileNotFoundError" in (tmp_path / "said").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-o", "calib.npy", "--", "true"), "is no .npz file"),
        (("-o", "no/folder/calib.npz", "--", "true"), "cannot write no/folder/calib.npz"),
        (("-o", "calib.npz", "--max-bytes", "many", "--", "true"), "not a size"),
        (("-o", "calib.npz", "--", "no-such-program"), "cannot run no-such-program"),
        (("-o", "calib.npz", "--", "true"), "ran no session"),
        (("-o", "calib.npz"), "Missing argument"),
        (("--", "true"), "Missing option"),
    ],
)
def test_what_cannot_be_recorded_is_said(
    words: tuple[str, ...],
    said: str,
    onnxcomp: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = onnxcomp("record", *words)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert names(tmp_path) == []
