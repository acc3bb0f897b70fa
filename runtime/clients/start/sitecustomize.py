"""What Python runs when it starts below `onnxcomp exec` or `onnxcomp record`.

The folder of this file is on PYTHONPATH and holds nothing else. ONNX Runtime is changed when the
application imports it, not before: most programs never do. Then the user's own sitecustomize runs.

Works without onnxcomp, in any Python from 3.8 on.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from typing import Any

_FOLDER = os.path.dirname(os.path.abspath(__file__))
_VARIABLE = "ONNXCOMP_CLIENT"
_SESSIONS = "onnxruntime.capi.onnxruntime_inference_collection"


def _warn(text: str) -> None:
    sys.stderr.write(f"onnxcomp: warning: {text}\n")


def _load(name: str) -> Any:
    """A file of the folder above, as a module of a name that nobody else has."""
    path = os.path.join(os.path.dirname(_FOLDER), name + ".py")
    spec = importlib.util.spec_from_file_location("_onnxcomp_" + name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _change(sessions: Any, settings: Any) -> None:
    """Change ONNX Runtime's classes; whatever fails, the application runs as without us."""
    warned: set[str] = set()

    def warn(text: str) -> None:
        if text not in warned:
            warned.add(text)
            _warn(text + "; compressed models run by their own definitions")

    try:
        if settings["library"]:
            _load("patching").SessionPatch(sessions, settings["library"], warn)
        if settings["record"]:
            _load("recorder").Recorder(**settings["record"]).install(sessions)
    except Exception as error:
        _warn(f"ONNX Runtime stays as it is: {type(error).__name__}: {error}")


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and has it changed after its import."""

    def __init__(self, settings: Any) -> None:
        self._settings = settings

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """The spec of the module, with a loader that does more."""
        if fullname != _SESSIONS:
            return None
        sys.meta_path.remove(self)
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                _change(module, self._settings)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _begin() -> None:
    text = os.environ.get(_VARIABLE)
    if not text:
        return
    settings = json.loads(text)
    if _SESSIONS in sys.modules:  # a .pth file of the environment was faster
        _change(sys.modules[_SESSIONS], settings)
    else:
        sys.meta_path.insert(0, _WhenImported(settings))


def _continue() -> None:
    """Run the sitecustomize that this one hides. Its errors are for Python's site to report."""
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or os.curdir) != _FOLDER]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


try:
    _begin()
except Exception as error:
    _warn(f"ONNX Runtime stays as it is: {type(error).__name__}: {error}")
_continue()
