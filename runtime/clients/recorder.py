"""What an application feeds its sessions, sampled inside its own processes.

Only the standard library and numpy are imported: see `patching`. Python from 3.9 on will do. Every
sample is a file as soon as it is taken, so that an application may end in any way; `recording` puts
them together.

A process has a folder below the spool folder, a model a folder in that:

    <spool>/<nanoseconds>-<process>/<number>/model.json     whose inputs these are
                                             runs           a byte for every run
                                             <number>.npz   the samples, by input name
                                             unsupported, large    a byte for every one left out
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import random
import sys
import threading
import time
import weakref
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

__all__ = ["MODEL", "Recorder", "write_npz"]

Sample = dict[str, Any]

MODEL = "model.json"

# Types that .npz files hold.
_PLAIN = "biufcU"

_FeedOf = Callable[..., Mapping[str, Any]]

# Methods of sessions that run them, with what finds the inputs among the arguments. Parameters have
# ONNX Runtime's names: callers may use them.
_METHODS: dict[str, _FeedOf] = {
    "run": lambda output_names, input_feed, *_, **__: input_feed,
    "run_async": lambda output_names, input_feed, *_, **__: input_feed,
    "run_with_ort_values": lambda output_names, input_dict_ort_values, *_, **__: (
        input_dict_ort_values
    ),
    "run_with_iobinding": lambda iobinding, *_, **__: getattr(iobinding, _BOUND, {}),
    "run_with_ortvaluevector": lambda run_options, feed_names, feeds, *_, **__: {
        name: feeds[index] for index, name in enumerate(feed_names)
    },
}
# Attribute of an IOBinding: what each input is bound to.
_BOUND = "_onnxcomp_bound"


def write_npz(path: str, arrays: Iterable[tuple[str, Any]]) -> None:
    """Write arrays as `numpy.savez` does, one after the other, whatever their names.

    The file appears when it is complete. Its bytes depend on the arrays alone.
    """
    part = path + ".part"
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays:
            entry = zipfile.ZipInfo(name + ".npy")
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
    os.replace(part, path)


class UnsupportedError(Exception):
    """A value that .npz files do not hold."""


def _array(value: Any) -> Any:
    """A copy of what was fed as an array that .npz files hold; bfloat16 as float32."""
    if callable(value):  # memory that an IOBinding refers to
        value = value()
    if hasattr(value, "data_type"):  # an OrtValue, of ONNX Runtime's Python or of its C++
        kind = value.data_type()
        if not kind.startswith("tensor("):
            raise UnsupportedError(kind)
        value = _bfloat16(value) if "bfloat16" in kind else value.numpy()
    array = np.array(value)
    if array.dtype.kind == "O" and all(isinstance(item, str) for item in array.flat):
        array = array.astype(np.str_)
    if array.dtype.kind not in _PLAIN:
        raise UnsupportedError(array.dtype.name)
    return array


def _bfloat16(value: Any) -> Any:
    """Its 16 bits are the upper half of a float32."""
    shape = tuple(value.shape())
    bits = _memory(value.data_ptr(), np.dtype(np.uint16), shape)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _memory(address: int, dtype: Any, shape: tuple[int, ...]) -> Any:
    """An array at an address of this process."""
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, dtype)
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(buffer, dtype).reshape(shape)


class _Model:
    """The samples of one model in this process: a reservoir, in files.

    Attributes:
        capacity: How many samples it holds at most.
        seen: Runs that have begun.
        sizes: Bytes of the samples, by file.
    """

    def __init__(self, folder: str, facts: Mapping[str, Any], capacity: int, seed: str) -> None:
        self.folder = folder
        self.inputs = {entry["name"] for entry in facts["inputs"]}
        self.capacity = capacity
        self.seen = 0
        self.sizes: dict[str, int] = {}
        self._random = random.Random(seed)
        self._written = 0
        self._counters: dict[str, int] = {}
        os.makedirs(folder)
        with open(os.path.join(folder, MODEL), "w", encoding="utf-8") as file:
            json.dump(facts, file)

    @property
    def nbytes(self) -> int:
        """Bytes of its samples."""
        return sum(self.sizes.values())

    def wants(self) -> bool:
        """Count a run, and say whether its inputs become one of the samples."""
        self.seen += 1
        # Drawn for every run, so that what is kept depends on the order of runs alone.
        return self._random.random() * self.seen < self.capacity

    def count(self, what: str) -> None:
        """Add a byte to a file: the cheapest counter that a killed process leaves behind."""
        if what not in self._counters:
            path = os.path.join(self.folder, what)
            self._counters[what] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(self._counters[what], b".")

    def drop(self) -> None:
        """Give up a sample, any one."""
        name = self._random.choice(sorted(self.sizes))
        os.remove(os.path.join(self.folder, name))
        del self.sizes[name]

    def add(self, sample: Sample) -> None:
        """Write a sample."""
        name = f"{self._written:06}.npz"
        write_npz(os.path.join(self.folder, name), sample.items())
        self._written += 1
        self.sizes[name] = _nbytes(sample)


def _nbytes(sample: Sample) -> int:
    return sum(array.nbytes for array in sample.values())


class Recorder:
    """Keeps a uniform sample of the inputs of each model.

    Args:
        folder: Where samples go.
        samples: How many are kept of each model.
        max_bytes: Bytes that all of them take at most; the model with most gives up some.
        seed: Decides which are kept.
    """

    def __init__(self, folder: str, samples: int, max_bytes: int, seed: int) -> None:
        self._spool, self._samples, self._max_bytes, self._seed = folder, samples, max_bytes, seed
        self._broken = False
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Begin anew: a forked process has its own folder and its own samples."""
        self._lock = threading.Lock()
        self._folder = os.path.join(self._spool, f"{time.time_ns():020}-{os.getpid()}")
        self._models: dict[str, _Model] = {}
        self._sessions: weakref.WeakKeyDictionary[Any, _Model] = weakref.WeakKeyDictionary()

    def install(self, sessions: Any) -> None:
        """Have the methods of ONNX Runtime's sessions tell what they are fed."""
        for name, feed_of in _METHODS.items():
            if hasattr(sessions.Session, name):
                self._wrap(sessions.Session, name, feed_of)
        _remember_bindings(sessions.IOBinding)

    def _wrap(self, cls: Any, name: str, feed_of: _FeedOf) -> None:
        original = getattr(cls, name)

        @functools.wraps(original)
        def method(session: Any, *args: Any, **kwargs: Any) -> Any:
            taken = self._safely(self._take, session, lambda: feed_of(*args, **kwargs))
            result = original(session, *args, **kwargs)
            if taken is not None:
                self._safely(self._keep, *taken)
            return result

        setattr(cls, name, method)

    def _safely(self, work: Callable[..., Any], *args: Any) -> Any:
        """Whatever fails here, the application goes on."""
        if self._broken:
            return None
        try:
            return work(*args)
        except Exception as error:
            self._broken = True
            text = f"onnxcomp: warning: recording has ended: {type(error).__name__}: {error}\n"
            sys.stderr.write(text)
            return None

    def _take(
        self, session: Any, feed: Callable[[], Mapping[str, Any]]
    ) -> tuple[_Model, Sample | None, str]:
        """Copy the inputs of a run before it, if they are wanted: it may overwrite them."""
        with self._lock:
            model = self._model(session)
            wanted = model.wants()
        if not wanted:
            return model, None, ""
        try:
            given = {name: _array(value) for name, value in feed().items() if name in model.inputs}
        except (UnsupportedError, TypeError, ValueError, RuntimeError) as error:
            return model, None, type(error).__name__
        complete = given and len(given) == len(model.inputs)
        return model, given if complete else None, "" if complete else "incomplete"

    def _keep(self, model: _Model, sample: Sample | None, problem: str) -> None:
        """Store the inputs of a run that has succeeded."""
        with self._lock:
            model.count("runs")
            if problem:
                model.count("unsupported")
            elif sample is not None and not self._stored(model, sample):
                model.count("large")

    def _stored(self, model: _Model, sample: Sample) -> bool:
        """Make room and write; False where the limit leaves no room."""
        size = _nbytes(sample)
        if size > self._max_bytes:
            return False
        if len(model.sizes) >= model.capacity:
            model.drop()
        while sum(each.nbytes for each in self._models.values()) + size > self._max_bytes:
            # Other models keep one sample at least.
            spare = [m for m in self._models.values() if len(m.sizes) > (m is not model)]
            if not spare:
                return False
            largest = max(spare, key=lambda each: each.nbytes)
            largest.drop()
            largest.capacity = max(1, len(largest.sizes))
        model.add(sample)
        return True

    def _model(self, session: Any) -> _Model:
        """The model of a session; sessions of one file share it."""
        model = self._sessions.get(session)
        if model is None:
            path, content = session._model_path, session._model_bytes
            name = os.path.abspath(path) if path else hashlib.sha256(content or b"").hexdigest()
            if name not in self._models:
                if not os.path.isdir(self._spool):  # the application has outlived its parent
                    raise FileNotFoundError(f"{self._spool} is gone")
                inputs = [{"name": i.name, "rank": len(i.shape)} for i in session.get_inputs()]
                facts = {"model": name, "path": bool(path), "inputs": inputs}
                folder = os.path.join(self._folder, f"{len(self._models):03}")
                seed = f"{self._seed}:{os.path.basename(name)}"
                self._models[name] = _Model(folder, facts, self._samples, seed)
            model = self._sessions[session] = self._models[name]
        return model


def _remember_bindings(cls: Any) -> None:
    """Have IOBinding remember what inputs are bound to; they are read when a session runs."""

    def wrap(name: str, source: Callable[..., tuple[str, Any]]) -> None:
        """Have one method note the input that it binds."""
        original = getattr(cls, name)

        @functools.wraps(original)
        def method(binding: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(binding, *args, **kwargs)
            key, value = source(*args, **kwargs)
            binding.__dict__.setdefault(_BOUND, {})[key] = value
            return result

        setattr(cls, name, method)

    wrap("bind_cpu_input", lambda name, arr_on_cpu: (name, arr_on_cpu))
    wrap("bind_ortvalue_input", lambda name, ortvalue: (name, ortvalue))
    wrap("bind_input", _bound_memory)
    clear = cls.clear_binding_inputs

    @functools.wraps(clear)
    def clear_binding_inputs(binding: Any) -> Any:
        binding.__dict__.pop(_BOUND, None)
        return clear(binding)

    cls.clear_binding_inputs = clear_binding_inputs


def _bound_memory(
    name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int
) -> tuple[str, Any]:
    def read() -> Any:
        if device_type != "cpu":
            raise UnsupportedError(f"memory of {device_type}")
        return _memory(buffer_ptr, np.dtype(element_type), tuple(shape))

    return name, read
