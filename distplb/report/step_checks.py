"""Checks the type and size of everything that is drawn of a sampled step: a log may come from anywhere.

Shapes: L layers, M GPUs, P slots.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from distplb.errors import DistplbError
from distplb.records.step_event import StepEvent
from distplb.report.formatting import printable

__all__ = ["check_step", "num_gpus"]

_LIMIT = 2**63  # sums of larger numbers would overflow


def check_step(name: str, event: StepEvent) -> None:
    """Check a sampled step.

    Raises:
        DistplbError: with the name of the run, the number of the step, and what is wrong.
    """
    try:
        wrong = _wrong_numbers(event) or _wrong_levels(event) or _wrong_tables(event) or _wrong_replicas(event)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        wrong = str(error)
    if wrong:
        raise DistplbError(f"{printable(name)}: the sampled step {event.step!r:.20} is damaged ({wrong})")


def num_gpus(event: StepEvent) -> int | None:
    """M; None if the event has no tokens of GPUs."""
    tables = event.tokens_of_gpu_before or event.tokens_of_gpu_after
    return len(tables[0]) if tables else None


def _wrong_numbers(event: StepEvent) -> str:
    whole = (event.step, event.num_slots, event.num_nodes, event.replica_slots, event.bytes_inside, event.bytes_between)
    if not all(type(number) is int and 0 <= number < _LIMIT for number in whole):
        return "a count is negative, too large or no whole number"
    if not (event.step and event.num_slots and event.num_nodes):
        return f"step: {event.step}, slots: {event.num_slots}, nodes: {event.num_nodes}"
    if not all(map(_is_amount, (event.started, *event.seconds.values()))):
        return "a time is negative or not finite"
    return "" if all(isinstance(text, str) for text in (*event.layers, *event.seconds)) else "a name is not text"


def _is_amount(number: Any) -> bool:
    return type(number) in (int, float) and math.isfinite(number) and 0 <= number < _LIMIT


def _wrong_levels(event: StepEvent) -> str:
    layers = len(event.layers)
    for levels in (event.imbalance_before, event.imbalance_after, event.imbalance_bound):
        if len(levels) not in (0, layers):
            return f"layers: {layers}, imbalances: {len(levels)}"
        if not all(level is None or _is_amount(level) for level in levels):
            return "an imbalance is negative or not finite"
    return ""


def _wrong_tables(event: StepEvent) -> str:
    gpus = set()
    for table in filter(None, (event.tokens_of_gpu_before, event.tokens_of_gpu_after)):
        tokens = np.array(table)  # refuses rows of different lengths
        if tokens.ndim != 2 or len(tokens) != len(event.layers):
            return f"layers: {len(event.layers)}, but tokens of GPUs for {len(tokens)}"
        if tokens.dtype.kind != "i" or int(tokens.min(initial=0)) < 0:
            return "tokens of a GPU are negative, too large or no whole number"
        gpus.add(tokens.shape[1])
    if len(gpus) > 1 or 0 in gpus or any(number % event.num_nodes or event.num_slots % number for number in gpus):
        return f"nodes: {event.num_nodes}, slots: {event.num_slots}, GPUs by table: {sorted(gpus)}"
    return ""


def _wrong_replicas(event: StepEvent) -> str:
    if len(event.replicas) not in (0, len(event.layers)):
        return f"layers: {len(event.layers)}, but replicas for {len(event.replicas)}"
    all_replicas = [replica for layer in event.replicas for replica in layer]
    if not all_replicas:
        return ""
    triples, gpus = np.array(all_replicas), num_gpus(event)
    if triples.ndim != 2 or triples.shape[1] != 3 or triples.dtype.kind != "i" or int(triples.min()) < 0:
        return "a replica is not (slot, GPU, tokens)"
    slot, gpu, _ = triples.max(0).tolist()
    if gpus is None or slot >= event.num_slots or gpu >= gpus:
        return f"a replica of slot {slot} or on GPU {gpu}, with {event.num_slots} slots and {gpus or 0} GPUs"
    return ""
