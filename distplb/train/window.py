"""Loads: tokens routed to each expert, counted step by step.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distplb.core.arguments import refuse_wrong_types, shown, whole_number
from distplb.core.counts import Counts, as_counts, as_integers, marked, refuse_marked
from distplb.core.hashing import hashed
from distplb.core.plain_tensor import as_tensor, refuse_unreadable
from distplb.core.private_names import break_graph
from distplb.errors import DistplbError
from distplb.train.training_forwards import is_step

__all__ = ["LoadWindow", "group_of_steps", "window_near"]

_NONE = -1  # the number of no step
_VALUELESS = ("meta",)  # devices whose tensors have no values; tests let it stand for an accelerator
_EACH_STEP = 2048  # so many steps after a clear, at the least, are drawn for one by one, and later ones in blocks
_LAST_STEP = 2**31  # from here on none is kept; times a hash of 32 bits it still fits an int64
# A step is several operations on the same tensors. One for all windows: a compiled graph knows tensors, not windows.
_one_at_a_time = threading.RLock()


class LoadWindow:
    """Counts on this rank: an even, seeded sample of all steps since the last clear, kept on the device.

    Up to T steps, all are kept. From then on each step, old or new, is among the kept with the same chance, however
    many there are. Which ones depends on the seed, on how often the window was cleared and on the number of the step,
    on nothing else: all layers and ranks keep the same. From step 2,048 on (from the power of two that is at least 2 T,
    where that is more) steps that follow each other do not go together: of blocks of 2 steps, from step 4,096 on of 4,
    from 8,192 on of 8 and so on, at most one step each is kept.

    `add` belongs in the forward of a layer. It never waits for the device, writes in place and keeps its write
    index on the device, so it may be part of a captured CUDA graph: whether the forward is one of the training is then
    decided at the capture, and holds for every replay. In a compiled forward, also in a full graph, it is one operation
    that decides when it runs. Threads may call it at once, as long as their streams wait for each other.

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
        device: where the counts are made. None: where the first ones are, to which the window then moves. A captured
            CUDA graph, and a forward that is compiled as a full graph, cannot wait for that: pass the device there, or
            run a forward before.
        seed: of the sample; the same on all ranks.
        max_bytes: what int64 counts `[T, L, E]` may take; T is less than `num_steps` where they would take more.

    Raises:
        DistplbError: for a size below 1, or where not even one step fits in `max_bytes`.
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
        # Row T takes what is not kept, so that each step is the same operations.
        self._counts = torch.zeros(rows + 1, num_layers, num_experts, dtype=torch.int64, device=device)
        self._numbers = torch.empty(rows + 1, num_layers, dtype=torch.int64, device=device)  # whose counts these are
        self._written = torch.empty(num_layers, dtype=torch.int64, device=device)  # steps since the last clear
        self._half = max(_EACH_STEP, 1 << (2 * rows - 1).bit_length()) // 2
        doublings = max(0, (_LAST_STEP // (2 * self._half)).bit_length() - 1)
        blocks = self._half * (2 + doublings)  # B, see `_draw`
        # The step of each block that may be kept, and the one after it: where a step lies among them tells its row.
        self._edges = torch.empty(2 * blocks, dtype=torch.int64, device=device)
        self._rows = torch.full((2 * blocks + 1,), rows, dtype=torch.int64, device=device)
        self._clears = 0
        self._start()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, L, E) of the full window."""
        rows, layers, experts = self._counts.shape
        return rows - 1, layers, experts

    @property
    def seen(self) -> int:
        """Steps that every layer has had since the last clear, kept or not. Waits for the device."""
        return int(self._written.min())

    def add(self, layer: int, counts: Counts, *, training: bool | None = None) -> None:
        """Take in one step of one layer, unless this forward is an evaluation or a recomputation.

        Recomputation under activation checkpointing runs inside the backward pass, and is known by that. An
        evaluation is known by `training=False`, or by nothing being recorded for a backward pass, whatever `training`
        says. The first forward of a reentrant checkpoint, which runs without gradients, is known by the checkpoint
        around it. The same holds where the forward, the checkpoint or both are compiled; torch's experimental compiled
        autograd needs a torch later than 2.6, with which recomputations were counted.

        Args:
            layer: index in [0, L).
            counts: `[E]`, this rank's tokens for each of the router's outputs: integers, or floats that are whole
                numbers and that their dtype counts exactly.
            training: pass `module.training` where evaluations run with gradients; they would otherwise be counted.
                `True` does not make a step of a forward under `torch.no_grad()`.

        Raises:
            DistplbError: for a layer that is not there, counts of another number of experts or on another device than
                the window, and what is no count where the counts are on the host; on an accelerator, where nobody
                waits, `load` tells of it. Or, of a compiled forward, if one without gradients is a part of one with
                gradients.
        """
        num_layers, num_experts = self._counts.shape[1:]
        if type(layer) is not int:
            layer = whole_number("LoadWindow.add: layer", layer, expected=f"an index in [0, {num_layers})")
        if not 0 <= layer < num_layers:
            raise DistplbError(f"LoadWindow.add: layer is {layer}; pass an index in [0, {num_layers})")
        if not isinstance(counts, Tensor):
            counts = as_tensor("LoadWindow.add: counts", counts)
        elif type(counts).__name__ == "DTensor" or not torch.compiler.is_compiling():
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
            if not torch.compiler.is_compiling() and not is_step(torch.is_grad_enabled()):
                return  # an evaluation, which may run elsewhere
            self._move_to(counts.device)
        buffers = (self._counts, self._numbers, self._written, self._edges, self._rows)
        # Compiled, whether gradients are on is known now, and a part of what the graph is guarded by.
        add = torch.ops.distplb.add if torch.compiler.is_compiling() else _add
        add(*buffers, layer, counts.detach(), torch.is_grad_enabled(), self._layers[layer])

    def load(self) -> Tensor:
        """`[T', L, E]` int64: the kept steps that every layer has, in the order of time. Waits for the device.

        T' ≤ T; while layers differ in their number of steps, as in the middle of a forward, only what all of them
        keep under the same number is handed out.

        Raises:
            DistplbError: for what is no count, with layer, step and expert.
        """
        rows = self._common_rows()
        found = self._counts[rows]
        refuse_marked(found, self._numbers[rows, 0], self._layers)
        return found

    def steps(self) -> Tensor:
        """`[T']` int64: the numbers of the steps of `load`, counted from 0 at the last clear. Waits for the device."""
        return self._numbers[self._common_rows(), 0]

    def name_layers(self, names: Sequence[str]) -> None:
        """Have errors call the L layers by these names."""
        self._layers = tuple(repr(name) for name in names)

    def rename(self, source: Counts) -> None:
        """The router's outputs have changed places: credit each with what another has counted. In place.

        >>> window = LoadWindow(num_layers=1, num_experts=3, num_steps=1)
        >>> window.add(0, torch.tensor([10, 20, 30]), training=True)
        >>> window.rename(torch.tensor([[1, 0, 2]]))
        >>> window.load()
        tensor([[[20, 10, 30]]])

        Args:
            source: `[L, E]` int64, the former number of each output; a permutation of each layer's.

        Raises:
            DistplbError: if it is not.
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
                f"LoadWindow.rename: source of layer {layer} is {source[layer].tolist()}; pass a permutation of the "
                f"numbers 0 to {num_experts - 1}"
            )
        changed = (source != outputs).any(1).nonzero()[:, 0].tolist()
        with _one_at_a_time:
            for layer in changed:
                self._counts[:, layer] = self._counts[:, layer, source[layer]]

    def clear(self) -> None:
        """Forget all steps, without waiting for the device. The next sample is drawn anew."""
        with _one_at_a_time:
            self._clears += 1
            self._start()

    def _move_to(self, device: torch.device) -> None:
        """Go where the first counts are."""
        if device.type in _VALUELESS:
            raise DistplbError("LoadWindow.add: counts are on the device meta, which keeps no values; pass real ones")
        if torch.compiler.is_compiling():
            break_graph()  # refused in a full graph: pass LoadWindow(device=...), or run a forward that is not compiled
        with _one_at_a_time:
            if device == self._counts.device:
                return  # another thread's first counts have had it go there meanwhile
            if not self._may_move:
                raise DistplbError(
                    f"LoadWindow.add: counts are on {device}, the window on {self._counts.device}; pass "
                    f"LoadWindow(device={str(device)!r}), or no device to have it where the first counts are"
                )
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise DistplbError(
                    f"LoadWindow.add: the first counts, on {device}, are made while a CUDA graph is captured, and the "
                    f"window is on {self._counts.device}; pass LoadWindow(device={str(device)!r}), or run a forward "
                    "before"
                )
            with torch.inference_mode(False):  # what is made in it could not be written afterwards
                for name in ("_numbers", "_written", "_edges", "_rows", "_counts"):  # whose device tells comes last
                    setattr(self, name, getattr(self, name).to(device))
            self._may_move = False

    def _start(self) -> None:
        self._written.zero_()
        self._numbers.fill_(_NONE)
        # Drawn once and in place: `add` is a part of every forward, and of captured graphs, and only looks them up.
        self._draw()

    def _draw(self) -> None:
        """Draw ahead, by reservoir sampling, which steps will be kept and in which rows. Never waits for the device.

        Vitter, "Random Sampling with a Reservoir" (1985), algorithm R: for step n a number below n + 1 is drawn, which
        is its row if it is below T. A table of all steps would have an end, so that this is done for each of the first
        M = 2 · `half` only. The steps from M · 2^(k−1) to M · 2^k are taken in M / 2 blocks of 2^k. For a block that
        ends before step n, a number below n is drawn, and where it is below T · 2^k, one of its steps, at a random
        place, goes to row number // 2^k. Each of its steps is then kept with the chance T / n, and each step before it
        stays with the chance 1 − 2^k / n, as after the last step of the block in algorithm R.
        """
        num_steps, half = self.shape[0], self._half
        block = torch.arange(len(self._edges) // 2, device=self._edges.device)  # [B]
        bits = (block // half - 1).clamp(min=0)  # k
        start = (block - bits * half) << bits
        end = start + (1 << bits)
        # Another hash for each window: the same positions every time would miss what happens in between.
        state = hashed(torch.zeros_like(start[:1]), self._seed, self._seed >> 32, self._clears)
        step = start + hashed(state, start, 1) % (end - start)
        die = hashed(state, step)  # in [0, 2^32)
        # Of 32 bits modulo n, some remainders are more frequent by one part in 2^32 / n, which is too much for large n.
        drawn = torch.where(bits == 0, die % end, (die * end) >> 32)
        row = torch.where(step < num_steps, step, (drawn >> bits).clamp(max=num_steps))
        self._edges[0::2] = step
        self._edges[1::2] = step + 1
        self._rows[1::2] = row  # at an edge's own place; in between, steps go to row T, which is not read

    def _common_rows(self) -> Tensor:
        """`[T']`: rows in which all layers have the same step, in the order of time."""
        numbers = self._numbers[:-1]  # [T, L]
        first = numbers[:, 0]
        rows = ((numbers == first[:, None]).all(1) & (first != _NONE)).nonzero()[:, 0]
        return rows[first[rows].argsort()]


def window_near(device: torch.device, num_layers: int, num_experts: int, num_steps: int, seed: int) -> LoadWindow:
    """A window that begins on a device where the first counts are likely, and goes where they are."""
    window = LoadWindow(num_layers, num_experts, num_steps, device=device, seed=seed)
    window._may_move = True
    return window


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
    """One step of one layer of a window, whose tensors come first, unless it is none of the training.

    Written by `data`, which has no version: a checkpoint in a compiled forward may hold the window's tensors as its
    inputs, and would refuse to recompute with what has changed since.
    """
    if not is_step(has_gradients):
        return
    if tokens.device.type == "cpu":
        tokens = as_counts(f"LoadWindow.add: layer {name}", tokens, ("expert",))
    else:
        tokens = marked(tokens)  # nobody waits for the device; `load` looks at it
    tokens = tokens.reshape(1, -1)  # [1, E]
    number = written.data[layer : layer + 1]  # [1], a view: nothing is read on the host
    with _one_at_a_time:
        row = rows.index_select(0, torch.searchsorted(edges, number, right=True))  # [1]
        counts.data[:, layer].index_copy_(0, row, tokens)
        numbers.data[:, layer].index_copy_(0, row, number)
        number.add_(1)


# What a compiler takes for one operation, and does not look into. `torch.library.custom_op` would count up versions.
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
            f"LoadWindow: one step of {num_layers} layers × {num_experts} experts takes {one_step} bytes, "
            f"max_bytes is {max_bytes}; pass at least {one_step}"
        )
    return max_bytes // one_step


def group_of_steps(steps: Tensor, num_groups: int, seed: int) -> Tensor:
    """`[T']` int64: for each step, which of the EP groups side by side stands for it with its counts.

    Shared out evenly: each block of `num_groups` rows, one after the other, has each group once, in an order that
    depends on the seed and the steps' numbers.

    >>> group_of_steps(torch.arange(7), num_groups=3, seed=0)
    tensor([2, 0, 1, 2, 0, 1, 2])

    Args:
        steps: `[T']` int64, as from `LoadWindow.steps`.
        num_groups: EP groups that hold copies of the same experts.
        seed: the same on all ranks.

    Raises:
        DistplbError: for less than one group.
    """
    num_groups = whole_number("num_groups", num_groups, 1, "the number of EP groups, at least 1")
    missing = torch.arange(1, -len(steps) % num_groups + 1, device=steps.device)
    whole = torch.cat([steps, -missing])  # the last block is filled up with numbers that no step has
    # The sum tells windows apart, so that it is not always the same group that the last block leaves out.
    keys = hashed(torch.zeros_like(whole), seed, seed >> 32, steps.sum(), whole)
    keys = keys.view(-1, num_groups)  # [blocks, groups]
    return keys.argsort(dim=1, stable=True).argsort(dim=1).flatten()[: len(steps)]
