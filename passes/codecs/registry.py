"""All codecs by name: those of this package, and those of other packages.

A package adds a codec by an entry point of the group `GROUP`; its name is the codec's name, its
object the codec or its class::

    [project.entry-points."onnxcomp.codecs"]
    mine = "my_package.codec:MyCodec"

Entry points are listed when a name is asked for that is not built in, or all names are; a
package is imported no earlier than that. One that fails does not stop work without it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, MutableMapping
from importlib.metadata import EntryPoint

from onnxcomp import plugins
from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.protocol import Codec

__all__ = ["GROUP", "CodecRegistry"]

log = logging.getLogger(__name__)

GROUP = "onnxcomp.codecs"


class CodecRegistry(MutableMapping[str, Codec]):
    """Codecs by name, in the order in which they were added; those of other packages come last.

    Args:
        codecs: Codecs that are there without any entry point.
    """

    def __init__(self, codecs: Iterable[Codec]) -> None:
        self._codecs = {codec.name: codec for codec in codecs}
        self._points: dict[str, EntryPoint] | None = None
        self._warned: set[str] = set()

    def _pending(self) -> dict[str, EntryPoint]:
        """Entry points that are not loaded, by name.

        Raises:
            UsageError: Two codecs have one name.
        """
        if self._points is None:
            points: dict[str, EntryPoint] = {}
            for point in plugins.find(GROUP):
                if point.name in self._codecs:
                    raise UsageError(
                        f"{plugins.origin(point)} has a codec named {point.name!r}, which is taken",
                        hint="uninstall it, or ask its authors for another name",
                    )
                if point.name in points:
                    others = plugins.origin(points[point.name])
                    raise UsageError(
                        f"{plugins.origin(point)} and {others} both have a codec "
                        f"named {point.name!r}",
                        hint="uninstall one of them",
                    )
                points[point.name] = point
            self._points = points
        return self._points

    def __getitem__(self, name: str) -> Codec:
        if name not in self._codecs and name in self._pending():
            self._codecs[name] = plugins.load(
                self._pending()[name], "codec", plugins.members(Codec)
            )
            del self._pending()[name]
        return self._codecs[name]

    def __setitem__(self, name: str, codec: Codec) -> None:
        self._codecs[name] = codec

    def __delitem__(self, name: str) -> None:
        del self._codecs[name]

    def __contains__(self, name: object) -> bool:
        return name in self._codecs or name in self._pending()

    def __iter__(self) -> Iterator[str]:
        """Names of all codecs that load; there is a warning of each one that does not."""
        for name in list(self._pending()):
            try:
                self[name]
            except UsageError as error:
                if name not in self._warned:
                    self._warned.add(name)
                    log.warning("%s (%s)", error.message, error.hint)
        return iter(list(self._codecs))

    def __len__(self) -> int:
        return sum(1 for _ in self)
