"""Every model server of Python, in an environment of its own, with what `package` writes.

    python benchmarks/bench_services.py [--only litserve ...] [--model FILE] [--home FOLDER]

For each kind of service: makes an environment and installs the folder's requirements from the
package index, starts the server by its own command on the loopback, waits until its health check
answers, sends one request and then several at once, and compares all answers with a session's.
The rows of each run of the model are counted, so that batches can be seen.
`--home` keeps the environments. A server that cannot be installed or started is a row with the
reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from environments import InstallError, installed, own_variables, version_of
from results import write_results

import onnxcomp
from onnxcomp.runtime.package.services import SERVICES, Service

Feed = dict[str, np.ndarray]
REQUESTS, START_SECONDS = 16, 300
# How each server is told its port, beside those that read PORT.
PORT_WORDS: dict[str, Callable[[int], list[str]]] = {
    "bentoml": lambda port: ["--host", "127.0.0.1", "--port", str(port)],
    "kserve": lambda port: ["--http_port", str(port), "--enable_grpc", "false"],
}
# Put behind the folder's model.py: notes how many rows each run had.
COUNTER = """

_run = Model.run


def _counted(self, requests):
    with (FOLDER / "rows.txt").open("a") as file:
        file.write(f"{sum(len(next(iter(r.values()))) for r in requests)}\\n")
    return _run(self, requests)


Model.run = _counted
"""
QUIET = {"BENTOML_DO_NOT_TRACK": "True", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}


def demo_model(folder: Path) -> Path:
    """The demo's model at 4 bits."""
    import onnxcomp.models.character_kinds as demo

    source = Path(str(demo.__file__)).parent / "model.onnx"
    target = folder / "characters.onnx"
    onnxcomp.optimize(source, target, bits=4, external_data="always", verify=False)
    return target


def feeds() -> Iterator[Feed]:
    """Requests for the model of the demo."""
    random = np.random.default_rng(0)
    for _ in range(REQUESTS):
        yield {"pairs": random.integers(0, 200, (1, 64))}


def free_port() -> int:
    """A port of the loopback that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ask(url: str, body: Any = None) -> Any:
    """GET, or POST of JSON; the answer's JSON, or None where it has none."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read()
    try:
        return json.loads(text)
    except ValueError:
        return None


def wait_until_well(process: subprocess.Popen[bytes], url: str) -> float:
    """Seconds until the health check answers."""
    begin = time.monotonic()
    while time.monotonic() - begin < START_SECONDS:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            ask(url)
            return time.monotonic() - begin
        except (OSError, urllib.error.URLError):
            time.sleep(0.5)
    raise RuntimeError(f"{url} did not answer within {START_SECONDS} s")


def request_of(form: str, feed: Feed) -> Any:
    """A request as the server wants it."""
    if form == "v2":
        kinds = {"int64": "INT64", "float32": "FP32"}
        return {
            "inputs": [
                {"name": name, "shape": list(value.shape), "datatype": kinds[value.dtype.name],
                 "data": value.ravel().tolist()}
                for name, value in feed.items()
            ]
        }  # fmt: skip
    lists = {name: value.tolist() for name, value in feed.items()}
    return {form: [lists] if form == "requests" else lists}


def answer_of(form: str, answer: Any, name: str) -> np.ndarray:
    """One output of an answer."""
    if form == "v2":
        (found,) = [entry for entry in answer["outputs"] if entry["name"] == name]
        return np.array(found["data"], np.float32).reshape(found["shape"])
    found = answer[0] if form == "requests" else answer["outputs"]
    return np.array(found[name], np.float32)


def exercise(service: Service, url: str, model: Path) -> dict[str, Any]:
    """Send requests one by one and at once, and compare with a session."""
    session = onnxcomp.InferenceSession(model)
    output = session.get_outputs()[0].name
    wanted = [session.run(None, feed)[0] for feed in feeds()]
    bodies = [request_of(service.body, feed) for feed in feeds()]
    begin = time.monotonic()
    alone = [ask(url, body) for body in bodies]
    middle = time.monotonic()
    with ThreadPoolExecutor(REQUESTS) as pool:
        joined = list(pool.map(lambda body: ask(url, body), bodies))
    end = time.monotonic()
    error = max(
        float(np.abs(answer_of(service.body, answer, output) - right).max())
        for answers in (alone, joined)
        for answer, right in zip(answers, wanted, strict=True)
    )
    return {"largest_error": error, "alone_s": middle - begin, "at_once_s": end - middle}


def run(kind: str, model: Path, home: Path, work: Path) -> dict[str, Any]:
    """Install, start, ask and stop one server."""
    service, port = SERVICES[kind], free_port()
    made = onnxcomp.package(model, work / kind, kind, name="characters", max_batch_size=8)
    with (made.path / "model.py").open("a", encoding="utf-8") as file:
        file.write(COUNTER)
    wanted = (made.path / "requirements.txt").read_text(encoding="utf-8")
    python = installed(home / kind, wanted.splitlines())
    more = {"PORT": str(port), "THREADS": "1", **QUIET}
    words = service.command.split() + PORT_WORDS.get(kind, lambda _: [])(port)
    if kind == "mlserver":
        more |= {"MLSERVER_HTTP_PORT": str(port), "MLSERVER_GRPC_PORT": str(free_port())}
        more["MLSERVER_METRICS_PORT"] = str(free_port())
    if kind == "ray":
        port = service.port
    log = work / f"{kind}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(python.with_name(words[0])), *words[1:]], cwd=made.path,
            env={**own_variables(python), **more},
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        base = f"http://127.0.0.1:{port}"
        seconds = wait_until_well(process, base + service.health)
        url = base + service.predict.format(name="characters")
        row = {"start_s": seconds, **exercise(service, url, model)}
        runs = (made.path / "rows.txt").read_text(encoding="utf-8").split()
        row |= {"runs": len(runs), "largest_batch": max(map(int, runs))}
    except (RuntimeError, OSError) as error:
        text = log.read_text(encoding="utf-8", errors="replace")
        print(text[-3000:], file=sys.stderr)
        row = {"failed": f"{error}: {' '.join(text.splitlines()[-1:])}"}
    finally:
        stop(process)
    package = service.requirements[0].split(">")[0].split("[")[0]
    return {**row, "version": version_of(python, package)}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and what it started."""
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    """Run all and write the JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", choices=sorted(SERVICES), action="append")
    parser.add_argument("--model", type=Path, help="A model with the demo's input.")
    parser.add_argument("--home", type=Path, default=Path("build/services"))
    options = parser.parse_args()
    home = options.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = options.model or demo_model(work)
        for kind in options.only or SERVICES:
            try:
                row = run(kind, model, home, work)
            except InstallError as error:
                row = {"failed": str(error)}
            rows.append({"service": kind, **row})
            print(json.dumps(rows[-1]), flush=True)
    if not options.only:
        print(write_results("services", {"python": platform.python_version(), "rows": rows}))
    if any(row.get("largest_error", 1) > 1e-4 for row in rows if "failed" not in row):
        sys.exit("a service answers something else than a session")


if __name__ == "__main__":
    main()
