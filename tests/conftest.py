"""Fixtures shared by all tests: the optional folder of real models, and MiniLM.

Nothing here is needed for the suite to mean something: tests that ask for a real model skip, with
the reason, where it is absent.
"""

import os
import runpy
import signal
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

# Files of other packages and of recipes, which tests put into trees of their own.
collect_ignore = ["plugins", "recipes"]


def pytest_configure() -> None:
    """Hear Ctrl-C, as programs of a terminal do, also where a shell started the tests behind it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def existing_path(variable: str, *candidates: Path) -> Path | None:
    """The path named by an environment variable, else the first candidate that exists."""
    named = os.environ.get(variable)
    paths = [Path(named)] if named else list(candidates)
    return next((path for path in paths if path.exists()), None)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real models and evaluation data: $ONNXCOMP_DATA, else ../shared/data."""
    found = existing_path("ONNXCOMP_DATA", ROOT.parent / "shared" / "data")
    if found is None:
        pytest.skip("no folder of real models: set ONNXCOMP_DATA")
    return found


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The MiniLM sentence encoder: $ONNXCOMP_MINILM, else minilm_l6_v2_embed.onnx in a cache."""
    name = "minilm_l6_v2_embed.onnx"
    found = existing_path("ONNXCOMP_MINILM", ROOT / ".cache" / name, ROOT.parent / "cache" / name)
    if found is None:
        pytest.skip("no MiniLM: set ONNXCOMP_MINILM to minilm_l6_v2_embed.onnx")
    return found


@pytest.fixture(scope="session")
def language_model_path(data_folder: Path) -> Path:
    """The small trained language model, opset 18, float32."""
    path = data_folder / "lm" / "tinyllama_ref.onnx"
    if not path.exists():
        pytest.skip(f"no language model at {path}")
    return path


@pytest.fixture(scope="session")
def decoder_script() -> dict[str, Any]:
    """The names of tests/small_decoder.py, which writes decoders."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    return runpy.run_path(str(ROOT / "tests" / "small_decoder.py"))


@pytest.fixture(scope="session")
def decoder_folder(
    decoder_script: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A decoder with a KV cache and random weights, its tokenizer, and `small.onnx`, in 4 bits."""
    import onnxcomp

    folder = tmp_path_factory.mktemp("decoder")
    decoder_script["write_random"](folder)
    onnxcomp.optimize(folder / "model.onnx", folder / "small.onnx", bits=4, verify=False)
    return folder


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The folder of SmolLM2-135M: $ONNXCOMP_SMOLLM2."""
    found = existing_path("ONNXCOMP_SMOLLM2", ROOT / ".cache" / "smollm2")
    if found is None:
        pytest.skip("no SmolLM2: set ONNXCOMP_SMOLLM2 to a folder with its model.onnx")
    return found


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The trained model that ships with the package; always there."""
    from onnxcomp.models.character_kinds import model_path

    return model_path()
