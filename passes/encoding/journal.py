"""What calibrated encoding has done so far, in the cache: a run that was killed continues there.

Each finished weight is a file, named by a hash of everything its bytes follow from: the model, the
inputs, the code, its settings and those of all weights before it. Beside them lie the activations
behind one of the last groups, so that the model does not run again from its beginning. They are
large and of use to an interrupted run alone: a newer file replaces the older one, and none is left
when all weights are encoded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import CompressionError
from onnxcomp.passes.calibration.statistics import Calibration
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.payload_cache import (
    PayloadCache,
    code_version,
    plain_attributes,
    stored_payload_of,
)
from onnxcomp.passes.encoding.stored_arrays import read_arrays, storable
from onnxcomp.passes.encoding.workers import Fit
from onnxcomp.passes.ir.content import content_hash
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.weight import Array, Feed, Shift, Stats, WeightSite
from onnxcomp.runtime.machine import current_isa, look
from onnxcomp.runtime.session import import_runtime

__all__ = ["Activations", "Journal", "Walk"]

log = logging.getLogger(__name__)

# For each model and each input, values by name.
Activations = Sequence[Sequence[Mapping[str, Array]]]

_PACKAGE = Path(__file__).parents[2]

# Changes whenever the files do.
_FORMAT = 1

# Bytes of the activations of all runs in one folder: the oldest give way.
_MOST_BYTES = 16 << 30

# Activations are written when so many times the time that this takes went by since the last time.
_PATIENCE = 10.0

_TENSOR, _SHIFT = "tensor:", "shift"


@functools.cache
def _code() -> list[str]:
    """The code that calibrated bytes follow from, ours and that of others, and the processor."""
    digest = hashlib.sha256()
    for folder in (_PACKAGE / "passes", _PACKAGE / "runtime"):
        for file in sorted(folder.rglob("*.py")):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    versions = [np.__version__, ir.__version__, str(import_runtime().__version__)]
    return [digest.hexdigest(), current_isa(look()), *versions]


def _hash(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _hash_of_feeds(feeds: Sequence[Feed]) -> str:
    digest = hashlib.sha256()
    for feed in feeds:
        for name, array in sorted(feed.items()):
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(
                repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
            )
    return digest.hexdigest()


def _chained(start: str, order: Sequence[tuple[WeightSite, Choice]]) -> Iterator[tuple[str, str]]:
    """For each weight its name and key, which depends on all before it."""
    key = start
    for site, choice in order:
        codec = CODECS[choice.codec]
        settings = [choice.params.to_json(), choice.mode, choice.error]
        key = _hash([key, site.name, codec.name, code_version(codec), *settings])
        yield site.name, key


def _remove(path: Path) -> None:
    """Remove a file that another run may have removed already."""
    with contextlib.suppress(OSError):
        path.unlink()


class Journal:
    """Finished weights of one calibrated run.

    Args:
        cache: Where files lie; None to keep nothing.
        model: The canonical model.
        feeds: Its inputs.
        order: All weights in the order of their encoding, and what the plan says about them.
        facts: What else bytes follow from, as JSON holds it.
    """

    def __init__(
        self,
        cache: PayloadCache | None,
        model: ir.Model,
        feeds: Sequence[Feed],
        order: Sequence[tuple[WeightSite, Choice]],
        facts: Sequence[object] = (),
    ) -> None:
        self._cache = cache
        self._choices = {site.name: choice for site, choice in order}
        self._keys: dict[str, str] = {}
        self._kept: str | None = None
        self._next_time = 0.0
        if cache is not None:
            base = [_FORMAT, content_hash(model), _hash_of_feeds(feeds), _code(), facts]
            self._keys = dict(_chained(_hash(base), order))
        paths = (self._path(name, "calibrated") for name in self._keys)
        known = sum(path is not None and path.exists() for path in paths)
        if known:
            log.info("%d of %d weights are known from an earlier run", known, len(order))

    def _path(self, name: str, ending: str) -> Path | None:
        if self._cache is None:
            return None
        return self._cache.folder / f"{self._keys[name]}.{ending}"

    def known(self, site: WeightSite) -> EncodedWeight | None:
        """A weight as an earlier run encoded it; None where none did."""
        path = self._path(site.name, "calibrated")
        found = None if path is None else read_arrays(path)
        if found is None:
            return None
        head, arrays = found
        choice, payload = self._choices[site.name], None
        if head["attributes"] is not None:
            tensors = {
                name.removeprefix(_TENSOR): array
                for name, array in arrays.items()
                if name.startswith(_TENSOR)
            }
            codec = CODECS[choice.codec]
            payload = stored_payload_of(tensors, head["attributes"], site, codec, choice.params)
            if payload is None:
                return None
        shift = None if head["shift"] is None else Shift(head["shift"], arrays[_SHIFT])
        return EncodedWeight(site, choice, payload, shift=shift, **head["facts"])

    def put(self, encoded: EncodedWeight) -> None:
        """Keep a finished weight."""
        path = self._path(encoded.site.name, "calibrated")
        if path is None or self._cache is None:
            return
        payload, shift = encoded.payload, encoded.shift
        arrays = {} if payload is None else {_TENSOR + n: t for n, t in payload.tensors.items()}
        if shift is not None:
            arrays[_SHIFT] = shift.change
        fields = ("error", "reason", "output_error", "note")
        head = {
            "attributes": None if payload is None else plain_attributes(payload.attributes),
            "shift": None if shift is None else shift.name,
            "facts": {name: getattr(encoded, name) for name in fields},
        }
        self._cache.write(path, head, arrays)

    def activations(self, last: WeightSite) -> list[list[dict[str, Array]]] | None:
        """What the models held behind a group; None where that is not kept.

        Args:
            last: The last weight of the group.
        """
        path = self._path(last.name, "activations")
        found = None if path is None else read_arrays(path)
        if found is None:
            return None
        head, arrays = found
        models: list[list[dict[str, Array]]] = [
            [{} for _ in range(count)] for count in head["inputs"]
        ]
        for (model, number, name), array in zip(head["values"], arrays.values(), strict=True):
            models[model][number][name] = array
        self._kept = last.name
        return models

    def keep(self, last: WeightSite, activations: Activations) -> None:
        """Keep what the models hold behind a group, where enough time went by since the last time.

        Args:
            last: The last weight of the group.
            activations: What they hold.
        """
        start = time.monotonic()
        if self._cache is None or not self._cache.lasting or start < self._next_time:
            return
        values = [
            ((place, number, name), array)
            for place, inputs in enumerate(activations)
            for number, held in enumerate(inputs)
            for name, array in held.items()
        ]
        if not all(storable(array) for _, array in values):
            return
        size = sum(array.nbytes for _, array in values)
        if not self._has_room(size):
            return
        head = {
            "inputs": [len(inputs) for inputs in activations],
            "values": [place for place, _ in values],
        }
        arrays = {str(number): array for number, (_, array) in enumerate(values)}
        path = self._path(last.name, "activations")
        if path is not None and self._cache.write(path, head, arrays):
            previous, self._kept = self._kept, last.name
            if previous is not None and previous != last.name:
                self._forget(previous)
        end = time.monotonic()
        self._next_time = end + _PATIENCE * (end - start)

    def _has_room(self, size: int) -> bool:
        """Whether activations of so many bytes may be kept; those of other runs may have to go."""
        assert self._cache is not None
        folder = self._cache.folder
        free = shutil.disk_usage(folder).free
        if size > _MOST_BYTES // 2 or 2 * size > free:
            log.info(
                "activations of %.1f GB are not kept: %.1f GB are free", size / 1e9, free / 1e9
            )
            return False
        own = None if self._kept is None else self._path(self._kept, "activations")
        found = []
        for path in folder.glob("*.activations"):
            with contextlib.suppress(OSError):  # another run may have removed it
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        total = size + sum(taken for _, taken, _ in found)
        for _, taken, path in sorted(found):
            if total > _MOST_BYTES and path != own:
                _remove(path)
                total -= taken
        return True

    def _forget(self, name: str) -> None:
        path = self._path(name, "activations")
        if path is not None:
            _remove(path)

    def close(self) -> None:
        """Forget all activations: every weight is encoded."""
        for name in self._keys:
            self._forget(name)


class Walk:
    """A calibration in which some weights are known already.

    The model runs only for those that are not, from the last place whose activations are kept.

    Args:
        calibration: Observes groups of weights.
        journal: What earlier runs have left.
        sequential: Whether weights are observed behind the compressed earlier ones.
    """

    def __init__(self, calibration: Calibration, journal: Journal, *, sequential: bool) -> None:
        self._calibration, self._journal, self._sequential = calibration, journal, sequential
        self._groups = calibration.groups
        self._next = 0
        # Known weights that the calibration has not been told of, each with its group and the
        # initializers that it changes.
        self._waiting: list[tuple[int, WeightSite, tuple[str, ...]]] = []

    def plainly(
        self, sites: Sequence[WeightSite], encode: Callable[[WeightSite], EncodedWeight]
    ) -> Iterator[EncodedWeight]:
        """Weights that no group has, before all groups.

        Args:
            sites: The weights.
            encode: Encodes one that is not known.
        """
        for site in sites:
            known = self._journal.known(site)
            yield self._new(encode(site)) if known is None else self._skipped(known, -1)

    def fitted(
        self,
        encode: Fit,
        before: Walk | None = None,
    ) -> Iterator[EncodedWeight]:
        """The weights of all groups.

        Args:
            encode: Encodes those of a group that are not known.
            before: The walk that follows, where that is what observes behind these weights.

        Raises:
            ModelError: Inputs of a weight hold NaN or infinite values.
            CompressionError: A file of the cache has gone since it was read.
        """
        behind = self if before is None else before
        for number, group in enumerate(self._groups):
            known = {site.name: self._journal.known(site) for site in group}
            wanted = [site for site in group if known[site.name] is None]
            fresh = encode(wanted, self._observe(number)) if wanted else None
            for site in group:
                found = known.pop(site.name)
                if found is not None:
                    yield behind._skipped(found, number if before is None else -1)
                elif fresh is not None:
                    yield behind._new(next(fresh))
            if fresh is not None:
                fresh.close()  # the moments go before those of the next group come
            if fresh is not None and number + 1 < len(self._groups):
                self._journal.keep(group[-1], self._calibration.activations)

    def _new(self, encoded: EncodedWeight) -> EncodedWeight:
        """A weight of this run: kept, and in its place for all that is observed later."""
        self._journal.put(encoded)
        self._replace(encoded)
        return encoded

    def _skipped(self, known: EncodedWeight, number: int) -> EncodedWeight:
        """A weight of an earlier run, of a group or, with -1, of what comes before all groups."""
        if self._sequential and known.payload is not None:
            names = [known.site.name, *([] if known.shift is None else [known.shift.name])]
            self._waiting.append((number, known.site, tuple(names)))
        return known

    def _replace(self, encoded: EncodedWeight) -> None:
        """Observe what follows behind a weight."""
        if not self._sequential or encoded.payload is None:
            return
        site, shift = encoded.site, encoded.shift
        if self._calibration.needs(site.name):
            decoded = CODECS[encoded.choice.codec].decode(site, encoded.payload)
            self._calibration.replace(site, decoded)
        if shift is not None and self._calibration.needs(shift.name):
            self._calibration.shift(shift)

    def _observe(self, number: int) -> Stats:
        """Statistics of a group, behind all known weights before it."""
        self._resume(number)
        for group in range(self._next, number):
            self._tell(group - 1)
            self._calibration.pass_by(group)
        self._tell(number - 1)
        found = self._calibration.observe(number)
        self._tell(number)
        self._next = number + 1
        return found

    def _resume(self, number: int) -> None:
        """Go to the last group before this one whose activations are kept."""
        for group in reversed(range(self._next, number)):
            found = self._journal.activations(self._groups[group][-1])
            if found is not None:
                self._calibration.resume(group, found)
                self._next = group + 1
                return

    def _tell(self, last: int) -> None:
        """Put known weights of groups up to this one in their places."""
        for number, site, names in self._waiting:
            if number <= last and any(map(self._calibration.needs, names)):
                encoded = self._journal.known(site)
                if encoded is None:
                    raise CompressionError(
                        f"the cache has lost weight {site.name!r} while it was used",
                        hint="give each command a cache folder of its own, and repeat this one",
                    )
                self._replace(encoded)
        self._waiting = [item for item in self._waiting if item[0] > last]
