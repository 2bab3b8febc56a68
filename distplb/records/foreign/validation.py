"""Checks that values are counts: the shape, integers, and names that belong to layers.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distplb.errors import DistplbError
from distplb.records.foreign.columns import role_of
from distplb.records.foreign.tables import Table

__all__ = ["validated"]

_LAYOUT = "[layers, experts] or [steps, layers, experts]"
_STATISTICS = {"mean", "average", "avg", "median", "max", "min", "std"}  # names of rows that are not layers
_NUMBERED = re.compile(r"([a-z]+)[ _.-]?[0-9]+", re.IGNORECASE)


def validated(path: Path, table: Table) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The counts, `[L, E]` or `[T, L, E]` int64, and the names of the L layers; "0", "1", ... if the file has none.

    Raises:
        DistplbError: naming the file and the place, if something is not a count or not a layer.
    """
    values, layers = table
    _check_shape(path, values)
    load = _as_int64(path, values)
    if layers is None:
        return load, tuple(str(layer) for layer in range(load.shape[-2]))
    load, layers = _without_total(path, load, layers)
    _check_names(path, layers)
    return load, layers


def _check_shape(path: Path, values: NDArray[Any]) -> None:
    shape = tuple(values.shape)
    if values.ndim == 4:
        raise DistplbError(
            f"{path} has shape {shape}, 4 dims; sum over the ranks, or over any dim that is not steps, layers or "
            f"experts, and pass counts as {_LAYOUT}"
        )
    if values.ndim not in (2, 3) or 0 in shape or values.dtype.kind not in "biufO":
        raise DistplbError(
            f"{path} has dtype {values.dtype} and shape {shape}; pass counts as {_LAYOUT}, with no empty dim"
        )


def _without_total(
    path: Path, load: NDArray[np.int64], layers: tuple[str, ...]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The counts without a row that is the sum of the others."""
    total = next((at for at, name in enumerate(layers) if role_of(name) == "total"), None)
    if total is None or len(layers) < 2:
        return load, layers
    others = [at for at in range(len(layers)) if at != total]
    if not np.array_equal(load[..., others, :].sum(-2), load[..., total, :]):
        raise DistplbError(
            f"{path}: {layers[total][:40]!r} is not the sum of the other rows; correct it, leave it out, or give "
            "the layer another name"
        )
    return np.ascontiguousarray(load[..., others, :]), tuple(layers[at] for at in others)


def _check_names(path: Path, layers: tuple[str, ...]) -> None:
    if len(set(layers)) != len(layers):
        twice = next(name for name in layers if layers.count(name) > 1)
        raise DistplbError(f"{path} has layer {twice[:80]!r} twice; give each layer its own name")
    other = next((name for name in layers if role_of(name) not in (None, "total")), None)
    if other is not None:
        raise DistplbError(
            f"{path}: {other[:40]!r} is the name of a column where the name of a layer is expected; pass a list of "
            "counts for each layer, or rows below a header"
        )
    statistic = next((name for name in layers if name.strip().lower() in _STATISTICS), None)
    if statistic is not None and len(layers) > 1:
        raise DistplbError(
            f"{path}: {statistic[:40]!r} is a statistic, not a layer; leave it out, or give the layer another name"
        )
    kinds = {match and role_of(match[1]) for match in (_NUMBERED.fullmatch(name) for name in layers)}
    if len(kinds) == 1 and kinds <= {"expert", "rank", "step"}:
        (kind,) = kinds
        raise DistplbError(
            f"{path}: {layers[0][:40]!r} names {'an expert' if kind == 'expert' else f'a {kind}'} where a layer is "
            "expected; pass a row for each layer and a column for each expert, summed over all ranks"
        )
    if not all(layers):
        raise DistplbError(f"{path} has a layer without a name; give each layer its own name")


def _as_int64(path: Path, values: NDArray[Any]) -> NDArray[np.int64]:
    """The counts as int64; refused if they are not counts, or not exact in their dtype."""
    if values.dtype.kind == "O":  # Python's numbers, some of which do not fit int64
        floats = np.frompyfunc(lambda number: isinstance(number, float) and not number.is_integer(), 1, 1)(values)
        _refuse(path, values, floats.astype(bool), "integers: pass tokens, not fractions of them")
    if values.dtype.kind == "f":
        _refuse(path, values, ~np.isfinite(values), "finite: check the counter that produced them")
        _refuse(path, values, values != np.rint(values), "integers: pass tokens, not fractions of them")
        limit = 2 ** min(62, np.finfo(values.dtype).nmant + 1)
        _refuse(
            path,
            values,
            np.abs(values) > limit,
            f"at most {limit} in {values.dtype}, which rounds larger ones: use int64",
        )
    _refuse(path, values, values < 0, "non-negative: check the counter that produced them")
    if values.dtype.kind in "uO":
        _refuse(path, values, values > np.iinfo(np.int64).max, "below 2^63: pass tokens of one window")
    return np.ascontiguousarray(values, dtype=np.int64)


def _refuse(path: Path, values: NDArray[Any], is_wrong: NDArray[Any], requirement: str) -> None:
    places = np.argwhere(is_wrong)
    if len(places):
        place = tuple(places[0].tolist())
        value = str(values[place].tolist() if isinstance(values[place], np.generic) else values[place])[:40]
        raise DistplbError(
            f"{path} has {value} at {list(place)} ({len(places)} such value{'s' * (len(places) != 1)}); counts must be "
            f"{requirement}"
        )
