"""Python functions that take the options of a table: their signatures, docstrings and types."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from onnxcomp.passes.config.option import Options, options_of

if TYPE_CHECKING:
    import os
    from typing import ParamSpec, Protocol

    P = ParamSpec("P")
    ResultT = TypeVar("ResultT", covariant=True)

    class OnModel(Protocol[P, ResultT]):
        """A function of a model and options."""

        __name__: str

        def __call__(self, model: Any, *args: P.args, **options: P.kwargs) -> ResultT:
            """Call it."""

    class ToFile(Protocol[P, ResultT]):
        """A function of a model, the path of its output, and options."""

        __name__: str

        def __call__(
            self,
            model: Any,
            output: str | os.PathLike[str] | None = None,
            *args: P.args,
            **options: P.kwargs,
        ) -> ResultT:
            """Call it."""


__all__ = ["takes", "takes_output"]


def takes(
    table: Callable[P, Options],
) -> Callable[[Callable[[Any, Any], ResultT]], OnModel[P, ResultT]]:
    """Let a function that is written for a table take its options as keyword arguments.

    The first parameter of the function gets the table that is built of the options. Its signature
    has the options instead, behind its other parameters, and so has its docstring in the place of
    the line about the first one. Building the table checks every value. Type checkers see them
    as the parameters of the table's constructor.

    Args:
        table: A class made by `onnxcomp.passes.config.option.table`.
    """
    taking = functools.partial(_taking, cast("type[Options]", table))
    return cast("Callable[[Callable[[Any, Any], ResultT]], OnModel[P, ResultT]]", taking)


def takes_output(
    table: Callable[P, Options],
) -> Callable[[Callable[[Any, Any, Any], ResultT]], ToFile[P, ResultT]]:
    """`takes` for a function that has the path of an output, too."""
    taking = functools.partial(_taking, cast("type[Options]", table))
    return cast("Callable[[Callable[[Any, Any, Any], ResultT]], ToFile[P, ResultT]]", taking)


def _taking(options: type[Options], function: Callable[..., Any]) -> Callable[..., Any]:
    written = inspect.signature(function)
    first, *own = written.parameters.values()
    signature = written.replace(parameters=[*own, *_keyword_parameters(options)])

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        try:
            given = signature.bind(*args, **named).arguments
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        others = {one.name: given.pop(one.name) for one in own if one.name in given}
        return function(options(**given), **others)

    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = _documented(function.__doc__, first.name, options)
    return call


def _keyword_parameters(options: type[Options]) -> list[inspect.Parameter]:
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(entry.name, kind, default=entry.default, annotation=entry.type)
        for entry in options_of(options)
    ]


def _documented(doc: str | None, name: str, options: type[Options]) -> str | None:
    """A docstring with the options in the place of the parameter that stands for them."""
    if doc is None:  # python -OO
        return None
    lines = doc.split("\n")
    (place,) = (i for i, line in enumerate(lines) if line.strip().startswith(f"{name}: "))
    indent = lines[place][: -len(lines[place].lstrip())]
    described: list[str] = []
    for entry in options_of(options):
        described += textwrap.wrap(
            f"{entry.name}: {entry.help} {entry.details}".rstrip(), 100,
            initial_indent=indent, subsequent_indent=f"{indent}    ",
            break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip
    return "\n".join([*lines[:place], *described, *lines[place + 1 :]])
