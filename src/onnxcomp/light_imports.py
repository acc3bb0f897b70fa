"""Lets `onnx_ir` be imported without sympy, which takes as long as all the rest of it.

Sympy is there to compute with symbolic dimensions, which no model is compiled by. While `onnx_ir`
is imported, sympy and the module that is made of it are stand-ins, which import the real ones when
something of them is used. Nobody else meets a stand-in: `sys.modules` has none of them then.

It is for programs that are started here, the command line and workers: a process that imports
`onnxcomp` as a library imports `onnx_ir` as it is.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec

__all__ = ["install"]

_PACKAGE = "onnx_ir"

# What waits until it is used; the second one builds a table of functions of the first one.
_WAITING: Mapping[str, Callable[[], ModuleType]] = {
    "sympy": lambda: importlib.import_module("sympy"),
    "onnx_ir._symbolic_shapes": lambda: importlib.import_module("onnx_ir._symbolic_shapes"),
}


class _StandIn(ModuleType):
    """A module that imports the real one of its name for its first attribute."""

    def __getattr__(self, name: str) -> Any:
        _withdraw(self)
        return getattr(_WAITING[self.__name__](), name)


def _withdraw(module: _StandIn) -> None:
    if sys.modules.get(module.__name__) is module:
        del sys.modules[module.__name__]


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Stand-ins while the block runs, unless sympy is there already."""
    found = [] if "sympy" in sys.modules else [_StandIn(name) for name in _WAITING]
    sys.modules.update({module.__name__: module for module in found})
    try:
        yield
    finally:
        for module in found:
            _withdraw(module)


class _Loader:
    """Loads a module as its own loader does, beside stand-ins."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As its own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code; its own loader is the one that others see."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        with _stand_ins():
            self._loader.exec_module(module)


class _Finder:
    """Finds the package where the other finders do."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """How to load the package; None for all other modules."""
        if name != _PACKAGE:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Finder))
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            # No subclass: importing `importlib.abc` takes longer than all else here.
            spec.loader = cast("Loader", _Loader(spec.loader))
        return spec


def install() -> None:
    """Let the next import of the package do without sympy."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
