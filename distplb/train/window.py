"""Loads: tokens routed to each expert, counted step by step.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplb.core.arguments import refuse_wrong_types, shown, whole_number
from distplb.core.counts import Counts, as_counts, as_integers, marked, refuse_marked
from distplb.core.hashing import hashed
from distplb.core.plain_tensor import as_tensor, refuse_unreadable
from distplb.core.private_names import break_graph
from distplb.errors import DistplbError
from distplb.train.training_forwards import is_step

__all__ = ["LoadWindow", "group_of_steps", "window_near"]

Array = NDArray[np.int64]

_NONE = -1  # marks a row without a step
_VALUELESS = ("meta",)  # devices whose tensors have no values; tests use it in place of an accelerator
_EACH_STEP = 2048  # at least this many steps after a clear are drawn one by one, later ones in blocks
_LAST_STEP = 2**31  # no later step is kept; times a hash of 32 bits it still fits an int64
# A step is several operations on the same tensors. One lock for all windows: a compiled graph has tensors, no window.
_one_at_a_time = threading.RLock()


class _Host(NamedTuple):
    """The memory of a window's tensors as arrays."""

    counts: Array  # [T + 1, L, E]
    numbers: Array  # [T + 1, L]
    written: Array  # [L]
    edges: Array  # [2 B]
    rows: Array  # [2 B + 1]


class LoadWindow:
    """This rank's counts: a uniform, seeded sample of all steps since the last clear, kept on the device.

    The first T steps are all kept. After that each step, old or new, is kept with the same probability, however many
    there are. The choice depends only on the seed, the number of earlier clears and the step's number, so all layers
    and ranks keep the same steps. From step 2,048 on (or the power of two that is at least 2 T, if that is more),
    neighbouring steps are not drawn independently: at most one step is kept of each block of 2, from step 4,096 on of
    each block of 4, from 8,192 on of 8, and so on.

    Call `add` in the forward of a layer. It never waits for the device, writes in place and keeps its write index on
    the device, so it may be part of a captured CUDA graph. Whether the forward counts as training is then decided at
    capture, for every replay. In a compiled forward, even a full graph, `add` is one operation that decides at run
    time. Several threads may call it at the same time, as long as their streams wait for each other.

    >>> window = LoadWindow(num_layers=1, num_experts=2, num_steps=2)
    >>> for number in range(10):
    ...     window.add(0, torch.tensor([number, 10 * number]), training=True)
    >>> window.seen, window.steps()
    (10, tensor([1, 9]))
    >>> window.load()
    tensor([[[ 1, 10]],
    <BLANKLINE>
            [[ 9, 90]]])

    Args:
        num_layers: L.
        num_experts: E.
        num_steps: T, the most steps that are kept; an iteration of several micro-batches has several steps.
        device: the device that counts are passed on. None starts on the CPU and moves to the device of the first
            counts. That cannot happen within a captured CUDA graph or a forward compiled as a full graph: pass the
            device there, or run one ordinary forward first.
        seed: seed of the sample; the same on all ranks.
        max_bytes: most bytes for the int64 counts `[T, L, E]`. If `num_steps` would need more, T is smaller.

    Raises:
        DistplbError: if a size is below 1, or not even one step fits in `max_bytes`.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_steps: int,
        *,
        device: torch.device | str | None = None,
        seed: int = 0,
        max_bytes: int = 64 * 2**20,
    ) -> None:
        num_layers, num_experts, num_steps, max_bytes = (
            whole_number(f"LoadWindow: {name}", value, minimum=1)
            for name, value in (
                *(("num_layers", num_layers), ("num_experts", num_experts)),
                *(("num_steps", num_steps), ("max_bytes", max_bytes)),
            )
        )
        self._seed = whole_number("LoadWindow: seed", seed)
        rows = min(num_steps, _steps_that_fit(num_layers, num_experts, max_bytes))
        self._may_move, device = device is None, _device("cpu" if device is None else device)
        self._layers = tuple(str(layer) for layer in range(num_layers))  # as errors name them
        # Row T takes the steps that are not kept, so that each step runs the same operations.
        self._counts = torch.zeros(rows + 1, num_layers, num_experts, dtype=torch.int64, device=device)
        self._numbers = torch.empty(rows + 1, num_layers, dtype=torch.int64, device=device)  # the step in each row
        self._written = torch.empty(num_layers, dtype=torch.int64, device=device)  # steps since the last clear
        self._half = max(_EACH_STEP, 1 << (2 * rows - 1).bit_length()) // 2
        doublings = max(0, (_LAST_STEP // (2 * self._half)).bit_length() - 1)
        blocks = self._half * (2 + doublings)  # B, see `_draw`
        # The step of each block that may be kept, and the step after it. A step's position among them gives its row.
        self._edges = torch.empty(2 * blocks, dtype=torch.int64, device=device)
        self._rows = torch.full((2 * blocks + 1,), rows, dtype=torch.int64, device=device)
        self._clears = 0
        self._host: _Host | None = None  # the tensors' memory as arrays, once counts come on the CPU
        self._start()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, L, E) of a full window."""
        rows, layers, experts = self._counts.shape
        return rows - 1, layers, experts

    @property
    def seen(self) -> int:
        """Steps that every layer has counted since the last clear, kept or not. Waits for the device."""
        return int(self._written.min())

    def add(self, layer: int, counts: Counts, *, training: bool | None = None) -> None:
        """Count one step of one layer, unless this forward is an evaluation or a recomputation.

        A recomputation under activation checkpointing is recognised because it runs inside the backward pass. An
        evaluation is recognised by `training=False`, or because nothing is recorded for a backward pass, whatever
        `training` is. The first forward of a reentrant checkpoint also runs without gradients; it is recognised by the
        checkpoint around it and counted. The same holds if the forward, the checkpoint or both are compiled. With
        torch's experimental compiled autograd, torch 2.6 counts recomputations; use a later version.

        Args:
            layer: index in [0, L).
            counts: `[E]`, this rank's tokens for each of the router's outputs: integers, or floats with integer values
                small enough for their dtype to count exactly.
            training: pass `module.training` if evaluations run with gradients; they would otherwise be counted. A
                forward under `torch.no_grad()` is not counted even with True.

        Raises:
            DistplbError: if the layer does not exist, or the counts have another number of experts or are on another
                device than the window. Invalid counts on the host are refused here; on an accelerator `add` does not
                wait to check them, and `load` raises instead. Also if a compiled forward with gradients contains one
                without gradients.
        """
        (_, num_layers, num_experts), is_compiling = self._counts.shape, torch.compiler.is_compiling()
        if type(layer) is not int:
            layer = whole_number("LoadWindow.add: layer", layer, expected=f"an index in [0, {num_layers})")
        if not 0 <= layer < num_layers:
            raise DistplbError(f"LoadWindow.add: layer is {layer}; pass an index in [0, {num_layers})")
        if not isinstance(counts, Tensor):
            counts = as_tensor("LoadWindow.add: counts", counts)
        elif type(counts).__name__ == "DTensor" or not (is_compiling or _is_plain_int64(counts)):
            refuse_unreadable("LoadWindow.add: counts", counts)
        if counts.dim() != 1 or counts.numel() != num_experts:
            raise DistplbError(
                f"LoadWindow.add: counts has shape {tuple(counts.shape)}; pass [{num_experts}], one for each of the "
                "router's outputs"
            )
        if training not in (True, False, None):
            refuse_wrong_types({"LoadWindow.add: training": (training, (bool, None), "True, False or None")})
        if training is not None and not training:
            return
        if counts.device != self._counts.device:
            if not is_compiling and not is_step(torch.is_grad_enabled()):
                return  # an evaluation, which may run on another device
            self._move_to(counts.device)
        if not is_compiling and counts.is_cpu:
            if is_step(torch.is_grad_enabled()):
                self._add_on_host(layer, counts)
            return
        buffers = (self._counts, self._numbers, self._written, self._edges, self._rows)
        # When compiling, the gradient mode is known now, and the graph is guarded by it.
        add = torch.ops.distplb.add if is_compiling else _add
        add(*buffers, layer, counts.detach(), torch.is_grad_enabled(), self._layers[layer])

    def load(self) -> Tensor:
        """`[T', L, E]` int64: the kept steps that every layer has, in chronological order. Waits for the device.

        T' ≤ T. While some layers are a step ahead, as in the middle of a forward, only the steps that all layers keep
        are returned.

        Raises:
            DistplbError: if a count is invalid, with its layer, step and expert.
        """
        rows = self._common_rows()
        found = self._counts[rows]
        refuse_marked(found, self._numbers[rows, 0], self._layers)
        return found

    def steps(self) -> Tensor:
        """`[T']` int64: the numbers of the steps in `load`, counted from 0 at the last clear. Waits for the device."""
        return self._numbers[self._common_rows(), 0]

    def name_layers(self, names: Sequence[str]) -> None:
        """Use these names for the L layers in error messages."""
        self._layers = tuple(repr(name) for name in names)

    def rename(self, source: Counts) -> None:
        """Permute the counts, in place, because the router's outputs have changed places.

        >>> window = LoadWindow(num_layers=1, num_experts=3, num_steps=1)
        >>> window.add(0, torch.tensor([10, 20, 30]), training=True)
        >>> window.rename(torch.tensor([[1, 0, 2]]))
        >>> window.load()
        tensor([[[20, 10, 30]]])

        Args:
            source: `[L, E]` int64, the former index of each output; a permutation in each layer.

        Raises:
            DistplbError: if `source` has another shape or a layer's row is not a permutation.
        """
        num_layers, num_experts = self._counts.shape[1:]
        source = as_integers("LoadWindow.rename: source", source, f"int64 of shape [{num_layers}, {num_experts}]")
        if source.shape != (num_layers, num_experts):
            raise DistplbError(
                f"LoadWindow.rename: source has shape {tuple(source.shape)}; pass [{num_layers}, {num_experts}]"
            )
        source = source.to(self._counts.device)
        outputs = torch.arange(num_experts, device=source.device)
        for layer in (source.sort(1).values != outputs).any(1).nonzero()[:1, 0].tolist():
            raise DistplbError(
                f"LoadWindow.rename: source of layer {layer} is {source[layer].tolist()}; pass a permutation of 0 to "
                f"{num_experts - 1}"
            )
        changed = (source != outputs).any(1).nonzero()[:, 0].tolist()
        with _one_at_a_time:
            for layer in changed:
                self._counts[:, layer] = self._counts[:, layer, source[layer]]

    def clear(self) -> None:
        """Clear all steps without waiting for the device, and draw a new sample."""
        with _one_at_a_time:
            self._clears += 1
            self._start()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: not the arrays, which would have memory of their own in it."""
        return vars(self) | {"_host": None}

    def _add_on_host(self, layer: int, counts: Tensor) -> None:
        """What `_add` does, with NumPy: the operations of torch take three times as long for so few numbers."""
        if not _is_plain_int64(counts) or np.minimum.reduce(counts.numpy()) < 0:
            counts = as_counts(f"LoadWindow.add: layer {self._layers[layer]}", counts, ("expert",))
        with _one_at_a_time:
            if self._host is None:
                tensors = (self._counts, self._numbers, self._written, self._edges, self._rows)
                self._host = _Host(*(tensor.numpy() for tensor in tensors))
            host = self._host
            number = host.written.item(layer)
            row = host.rows.item(host.edges.searchsorted(number, "right"))
            host.counts[row, layer] = counts.numpy()
            host.numbers[row, layer] = number
            host.written[layer] = number + 1

    def _move_to(self, device: torch.device) -> None:
        """Move to the device of the first counts."""
        if device.type in _VALUELESS:
            raise DistplbError("LoadWindow.add: counts are on the device meta, which keeps no values; pass real counts")
        if torch.compiler.is_compiling():
            break_graph()  # an error in a full graph: pass LoadWindow(device=...), or run an uncompiled forward first
        with _one_at_a_time:
            if device == self._counts.device:
                return  # another thread has moved it meanwhile
            if not self._may_move:
                raise DistplbError(
                    f"LoadWindow.add: counts are on {device}, the window on {self._counts.device}; pass "
                    f"LoadWindow(device={str(device)!r}), or no device to follow the first counts"
                )
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise DistplbError(
                    f"LoadWindow.add: the first counts, on {device}, arrive while a CUDA graph is captured, but the "
                    f"window is on {self._counts.device}; pass LoadWindow(device={str(device)!r}), or run a forward "
                    "before the capture"
                )
            with torch.inference_mode(False):  # inference tensors could not be written in place later
                for name in ("_numbers", "_written", "_edges", "_rows", "_counts"):  # last: `add` compares its device
                    setattr(self, name, getattr(self, name).to(device))
            self._may_move, self._host = False, None

    def _start(self) -> None:
        self._written.zero_()
        self._numbers.fill_(_NONE)
        # Drawn once and in place: `add` runs in every forward and in captured graphs, and only looks rows up.
        self._draw()

    def _draw(self) -> None:
        """Draw in advance, by reservoir sampling, which steps to keep and in which rows. Never waits for the device.

        Vitter, "Random Sampling with a Reservoir" (1985), algorithm R: for step n a number below n + 1 is drawn. If it
        is below T, it is the step's row. A table cannot hold all steps, so only the first M = 2 · `half` steps are
        drawn for one by one. The steps from M · 2^(k−1) to M · 2^k form M / 2 blocks of 2^k. For a block that ends
        before step n, a number below n is drawn. If it is below T · 2^k, one step at a random position in the block
        goes to row number // 2^k. Each step of the block is then kept with probability T / n, and each earlier kept
        step stays with probability 1 − 2^k / n, as after the last step of the block in algorithm R.
        """
        num_steps, half = self.shape[0], self._half
        block = torch.arange(len(self._edges) // 2, device=self._edges.device)  # [B]
        bits = (block // half - 1).clamp(min=0)  # k
        start = (block - bits * half) << bits
        end = start + (1 << bits)
        # Another hash after each clear: the same positions every time would always miss the steps in between.
        state = hashed(torch.zeros_like(start[:1]), self._seed, self._seed >> 32, self._clears)
        step = start + hashed(state, start, 1) % (end - start)
        die = hashed(state, step)  # in [0, 2^32)
        # 32 bits modulo n favour some remainders by one part in 2^32 / n, which is too much for large n.
        drawn = torch.where(bits == 0, die % end, (die * end) >> 32)
        row = torch.where(step < num_steps, step, (drawn >> bits).clamp(max=num_steps))
        self._edges[0::2] = step
        self._edges[1::2] = step + 1
        self._rows[1::2] = row  # for the chosen step of each block; all others go to row T, which is never read

    def _common_rows(self) -> Tensor:
        """`[T']`: rows in which all layers have the same step, in chronological order."""
        numbers = self._numbers[:-1]  # [T, L]
        first = numbers[:, 0]
        rows = ((numbers == first[:, None]).all(1) & (first != _NONE)).nonzero()[:, 0]
        return rows[first[rows].argsort()]


def window_near(device: torch.device, num_layers: int, num_experts: int, num_steps: int, seed: int) -> LoadWindow:
    """Build a window on the device where the first counts are likely; it moves if they are elsewhere."""
    window = LoadWindow(num_layers, num_experts, num_steps, device=device, seed=seed)
    window._may_move = True
    return window


def _is_plain_int64(counts: Tensor) -> bool:
    """Whether these are counts in the usual form, which need no closer look at what kind of tensor they are."""
    is_plain = type(counts) is Tensor and counts.dtype is torch.int64 and counts.layout is torch.strided
    return is_plain and not counts.is_nested


def _add(
    counts: Tensor,
    numbers: Tensor,
    written: Tensor,
    edges: Tensor,
    rows: Tensor,
    layer: int,
    tokens: Tensor,
    has_gradients: bool,
    name: str,
) -> None:
    """Count one step of one layer in a window's tensors, which come first, unless the forward is not training.

    It writes through `data`, which has no version counter: a checkpoint in a compiled forward may hold the window's
    tensors as inputs, and would refuse to recompute with tensors that have changed since.
    """
    if not is_step(has_gradients):
        return
    if tokens.device.type == "cpu":
        tokens = as_counts(f"LoadWindow.add: layer {name}", tokens, ("expert",))
    else:
        tokens = marked(tokens)  # `load` checks the values, so that nothing waits for the device here
    tokens = tokens.reshape(1, -1)  # [1, E]
    number = written.data[layer : layer + 1]  # [1], a view: nothing is read on the host
    with _one_at_a_time:
        row = rows.index_select(0, torch.searchsorted(edges, number, right=True))  # [1]
        counts.data[:, layer].index_copy_(0, row, tokens)
        numbers.data[:, layer].index_copy_(0, row, number)
        number.add_(1)


# An opaque operation for the compiler. `torch.library.custom_op` would increase version counters.
_library = torch.library.Library("distplb", "DEF")
_library.define(
    "add(Tensor(a!) counts, Tensor(b!) numbers, Tensor(c!) written, Tensor edges, Tensor rows, int layer, "
    "Tensor tokens, bool has_gradients, str name) -> ()"
)
_library.impl("add", _add, "CompositeExplicitAutograd")
torch.library.register_fake("distplb::add", lambda *_: None, lib=_library)


def _device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as unknown:
        raise DistplbError(f"LoadWindow: device is {shown(device)}; pass a torch.device or its name") from unknown


def _steps_that_fit(num_layers: int, num_experts: int, max_bytes: int) -> int:
    one_step = 8 * num_layers * num_experts
    if max_bytes < one_step:
        raise DistplbError(
            f"LoadWindow: max_bytes is {max_bytes}, but one step takes {one_step} bytes (num_layers {num_layers}, "
            f"num_experts {num_experts}); pass at least {one_step}"
        )
    return max_bytes // one_step


def group_of_steps(steps: Tensor, num_groups: int, seed: int) -> Tensor:
    """`[T']` int64: the EP group whose counts are used for each step.

    Groups are chosen equally often: each block of `num_groups` consecutive rows has every group once, in an order that
    depends on the seed and the steps' numbers.

    >>> group_of_steps(torch.arange(7), num_groups=3, seed=0)
    tensor([2, 0, 1, 2, 0, 1, 2])

    Args:
        steps: `[T']` int64, from `LoadWindow.steps`.
        num_groups: how many EP groups hold copies of the same experts.
        seed: the same on all ranks.

    Raises:
        DistplbError: if `num_groups` is less than 1.
    """
    num_groups = whole_number("num_groups", num_groups, 1, "the number of EP groups, at least 1")
    missing = torch.arange(1, -len(steps) % num_groups + 1, device=steps.device)
    whole = torch.cat([steps, -missing])  # pad the last block with numbers that no step has
    # The sum differs between windows, so that the last block does not always leave out the same group.
    keys = hashed(torch.zeros_like(whole), seed, seed >> 32, steps.sum(), whole)
    keys = keys.view(-1, num_groups)  # [blocks, groups]
    return keys.argsort(dim=1, stable=True).argsort(dim=1).flatten()[: len(steps)]
