"""Names of methods: which codecs a user asks for, and their parameters by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec
from onnxcomp.passes.config.values import one_of
from onnxcomp.passes.suggest import suggest

__all__ = ["method_names", "split_methods", "typed_params"]


def split_methods(text: str) -> tuple[str, ...]:
    """Codec names in ``"hyper+dense"``; a codec whose own name has a ``+`` is one of them."""
    if text in CODECS:
        return (text,)
    return tuple(part for part in text.split("+") if part)


def method_names(
    method: str | Sequence[str],
    known: Mapping[str, Codec],
    *,
    stock: bool = False,
    timed: bool = False,
) -> tuple[str, ...]:
    """Codec names asked for; "auto" stands for every codec that offers itself for it.

    Args:
        method: Names, or several joined by ``+``.
        known: All codecs by name.
        stock: Whether only codecs are used whose models need no operator library.
        timed: Whether "auto" stands for codecs as well that are there for speed.

    Raises:
        UsageError: A name is unknown, or its codec is not a stock one.
    """
    names = list(known)
    asked = [method] if isinstance(method, str) else list(method)
    result: list[str] = []
    for name in (part for item in asked for part in split_methods(item)):
        if name == "auto":
            automatic = [
                n
                for n, codec in known.items()
                if codec.automatic or (timed and codec.rounds_inputs)
            ]
            result += [n for n in automatic if known[n].stock or not stock]
            continue
        one_of("method", name, [*names, "auto"])
        if stock and not known[name].stock:
            allowed = ", ".join(n for n, codec in known.items() if codec.stock)
            raise UsageError(
                f"--stock and the method {name!r} contradict each other: it needs the library",
                hint=f"these do not: {allowed}",
            )
        result.append(name)
    if not result:
        raise UsageError("no method is given", hint=suggest("", [*names, "auto"]))
    return tuple(dict.fromkeys(result))


def typed_params(params_type: type[Params], values: Mapping[str, Any], codec: str) -> Params:
    """Codec parameters from names and plain values.

    Raises:
        UsageError: A name is unknown, or a value has the wrong type.
    """
    default = params_type()
    fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    typed = {}
    for name, value in values.items():
        if name not in fields:
            raise UsageError(
                f"codec {codec!r} has no parameter {name!r}", hint=suggest(name, fields)
            )
        wanted = type(fields[name])
        whole = isinstance(value, int) and wanted is float
        if isinstance(value, bool) or not (whole or isinstance(value, wanted)):
            raise UsageError(
                f"{codec} parameter {name} is {value!r}",
                hint=f"it must be of type {wanted.__name__}, for example {fields[name]!r}",
            )
        typed[name] = wanted(value)
    return dataclasses.replace(default, **typed)
