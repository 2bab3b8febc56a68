"""`StepBalancer`: lends GPUs replicas of the experts that are hot in a step, from count to gradients.

Shapes: N tokens of this rank, K experts of each token, P slots, M GPUs, G own and R replica slots of each GPU, X rows.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distplb.comm.steps import StepComm, StepOfOne, TorchStepComm
from distplb.core.arguments import refuse_wrong_types, shown, whole_number
from distplb.core.hashing import digest
from distplb.core.price import TimeCurve
from distplb.core.private_names import is_in_backward
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.replicas.count import Row, checked_counts, counts_of, marked_as_unseen, name_digest, refuse_weights
from distplb.replicas.lend import Experts, Lender, Loan, lent
from distplb.replicas.pushes import Pushes
from distplb.replicas.sampling import OnEvent, Sample, Sampler
from distplb.replicas.stages import StepStages
from distplb.replicas.tokens import own_slots, slots_of_tokens
from distplb.splitting.gate import is_surely_trivial
from distplb.splitting.inputs import checked_prices, checked_tolerance
from distplb.splitting.routes import Exchange, exchange_of
from distplb.splitting.rules import NEVER, Array
from distplb.splitting.split import split
from distplb.splitting.split_value import Split

__all__ = ["Dispatch", "StepBalancer"]

_REMEMBERED = 4096  # forwards of a layer that a recomputation may come back to


@dataclass(frozen=True, eq=False)
class Dispatch:
    """Where the tokens of one step of one layer go.

    Args:
        layer: the layer's name.
        split: the step's split; None if the loads of the GPUs tell that no replica pays.
        exchange: what this GPU sends and receives.
        slot_of_token: `[N, K]` int64, the physical slot of each token's experts, in [0, M * (G + R)).
        loan: the replicas, for `StepBalancer`; None if there are none.
        sample: where the step is measured, for `StepBalancer`; None if it is not sampled.
    """

    layer: Hashable
    split: Split | None
    exchange: Exchange
    slot_of_token: Tensor
    loan: Loan | None = field(default=None, repr=False)
    sample: Sample | None = field(default=None, repr=False)

    @property
    def send(self) -> Tensor:
        """`[M, G + R]` int64 on the host: the tokens that this GPU sends to each physical slot of each GPU."""
        return self.exchange.send

    @property
    def receive(self) -> Tensor:
        """`[M, G + R]` int64 on the host: the tokens that each GPU sends to each physical slot of this one."""
        return self.exchange.receive

    @property
    def is_trivial(self) -> bool:
        """Whether every token is computed at home."""
        return self.loan is None


class StepBalancer:
    """Lends replicas in every step in which that pays, over torch.distributed.

    In the forward of an MoE layer, on every rank of the expert-parallel (EP) group:

        step = balancer.dispatch("blocks.0.moe", slot)       # ids [N, K] -> where tokens go; takes the place of the
                                                             # dispatcher's own exchange of counts
        ...                                                  # send rows to step.slot_of_token
        rows = balancer.compute(step, experts, rows, w_in, w_out)
        ...                                                  # combine

    `experts(rows, own, replicas)` computes the rows that arrived, in the order of `step.receive`, with the G own rows
    of each weight and its R replica rows (none if the step is trivial). Its weights' gradients are whole when autograd
    hands them on: data parallelism, clipping and the optimizer do not notice.

    Every rank of the group takes part in every step, also one without tokens.

    Args:
        group_or_mesh: the EP group: a ProcessGroup, a DeviceMesh with one axis, or None for the default group. A group
            of the same ranks is created, so all ranks create their `StepBalancer`s in the same order.
        topology: nodes and GPUs of the EP group.
        num_experts: P, the same for all layers; `num_experts / M` on each GPU, in order.
        replica_slots: R.
        keep: hold the replicas of every step until its backward, instead of pushing them again.
        dry_run: split every step and tell what that would be worth, in `Dispatch.split` and in events, but lend
            nothing: every token is computed at home.
        deadline: seconds to wait for other ranks, as for `TorchComm`.
        on_event: called on this rank with a `StepEvent` for each sampled step, when the next one begins; for example an
            `EventLog` on rank 0. Exceptions that it raises are logged and do not reach the loop. If no rank passes one,
            no step is sampled. A sampled step takes about a millisecond longer in each layer; others do not.
        sample_every: one of so many steps of each layer is sampled, beginning with the first.
        options: of `split`: `tolerance`, `push_price`, `min_quota`, `max_tokens_per_gpu`, `tile`, `time_curve`.

    Raises:
        DistplbError: for a group, topology or option that does not fit.
    """

    def __init__(
        self,
        group_or_mesh: Any = None,
        *,
        topology: Topology,
        num_experts: int,
        replica_slots: int = 2,
        keep: bool = False,
        dry_run: bool = False,
        deadline: float = 300.0,
        on_event: OnEvent | None = None,
        sample_every: int = 100,
        tolerance: float = 0.005,
        push_price: tuple[float, float] = (0.0, math.inf),
        min_quota: int = 1,
        max_tokens_per_gpu: int | None = None,
        tile: int = 1,
        time_curve: TimeCurve | None = None,
    ) -> None:
        refuse_wrong_types(
            {
                "topology": (topology, (Topology,), "a Topology, such as Topology.from_env()"),
                "keep": (keep, (bool,), "True or False"),
                "dry_run": (dry_run, (bool,), "True or False"),
                "on_event": (on_event, (Callable, None), "a function, such as an EventLog"),
            }
        )
        self._topology = topology
        self._dry_run = dry_run
        self._num_slots = whole_number("num_experts", num_experts, minimum=1)
        self._num_own = topology.slots_per_gpu(self._num_slots)
        self._options: dict[str, Any] = {
            "replica_slots": replica_slots,
            "tolerance": tolerance,
            "push_price": push_price,
            "min_quota": min_quota,
            "max_tokens_per_gpu": max_tokens_per_gpu,
            "tile": tile,
            "time_curve": time_curve,
        }
        home = torch.arange(self._num_slots, device="cpu") // self._num_own
        self._home, self._own = home, torch.arange(self._num_slots, device="cpu").view(-1, self._num_own)
        self._split(torch.zeros(topology.num_gpus, self._num_slots, dtype=torch.int64, device="cpu"))  # checks options
        self._num_replicas = whole_number("replica_slots", replica_slots)
        self._tolerance, (self._inside, between) = checked_tolerance(tolerance), checked_prices(push_price)
        every = whole_number("sample_every", sample_every, minimum=1)
        agreed = (self._num_slots, topology, sorted(self._options.items()), keep, dry_run, every)
        self._digest = digest(repr(agreed).encode())
        self._comm: StepComm = (
            StepOfOne() if topology.num_gpus == 1 else TorchStepComm(group_or_mesh, deadline=deadline)
        )
        if self._comm.size != topology.num_gpus:
            raise DistplbError(
                f"the group has {self._comm.size} ranks, the topology {topology.num_gpus} GPUs; pass the EP group and "
                "its own topology, such as Topology.from_mesh(mesh['ep'])"
            )
        is_sampled, started = self._refuse_other_sizes(on_event)
        self._sampler: Sampler | None = None
        if is_sampled:
            self._sampler = Sampler(
                self._comm,
                on_event,
                every,
                started,
                topology=topology,
                own=self._own,
                num_replicas=self._num_replicas,
                between=between < NEVER,
            )
        self._stages = StepStages(self._comm)
        self._lender = Lender(self._comm, self._stages, keep=keep)
        self._calls = 0
        self._layers: dict[int, Hashable] = {}  # names by digest
        self._names: dict[Hashable, int] = {}  # and digests by name
        # Of steps in which all tokens are computed at home: [P], the physical slot of each slot.
        slots = torch.arange(self._num_slots, device=self._comm.device)
        self._own_slots = own_slots(slots, self._num_own, self._num_replicas)
        # Digests of what this rank's forwards counted, which a recomputation may come back to; the oldest first.
        self._seen = defaultdict[Hashable, dict[int, None]](dict)
        self._shapes = defaultdict[Hashable, set[tuple[tuple[torch.Size, torch.dtype], ...]]](set)  # agreed on

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the host so far by stage: count, split, push, push again, bring home, and sample if steps are."""
        return self._stages.seconds

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers for replicas and their gradients, which all layers share."""
        return self._lender.num_bytes

    def dispatch(self, layer: Hashable, expert_of_token: Tensor) -> Dispatch:
        """Count the step's tokens, split them, and tell where each token goes. Collective.

        In a recomputation (checkpointing) it decides as in the forward, or stops if the router has chosen otherwise.

        Args:
            layer: the layer's name, the same on all ranks; any hashable value.
            expert_of_token: `[N, K]` integers in [0, P), the slot of each token's experts. A layer that looks the slot
                of an expert up in a table passes `slot_of_expert[expert]`.

        Raises:
            DistplbError: the same on all ranks, for ids that do not fit, if the ranks are in different steps, or if no
                split keeps `max_tokens_per_gpu`.
            LostRanksError: if ranks do not answer.
        """
        self._calls += 1
        again = is_in_backward()
        sample = None
        if self._sampler is not None:
            sample = self._sampler.recomputed(layer) if again else self._sampler.sample(layer)
        with self._stages.stage("count", sample):
            name = self._name_of(layer)
            head = Row(self._calls, name, self._digest, again, torch.is_grad_enabled())
            row = head.tensor(expert_of_token, self._num_slots, self._comm.device)
            if again and _digest_of(counts_of(row).cpu().numpy()) not in self._seen[layer]:
                row = marked_as_unseen(row)
            counts = checked_counts(self._comm, row, self._layers)  # [M, P]
            counted = _digest_of(counts[self._comm.rank])  # of the host's copy, so that nothing waits for the device
            if not again:
                self._remember(layer, counted)
        if sample is not None and again and sample.counted != counted:  # another step of this layer is recomputed
            sample.forget_last()
            sample = None
        with self._stages.stage("split", sample):
            found = None if self._is_surely_trivial(counts) else self._split(torch.from_numpy(counts))
            if found is None or found.is_trivial or self._dry_run:
                step = self._at_home(layer, found, expert_of_token, counts, sample)
            else:
                exchange = exchange_of(found, self._topology, self._comm.rank, self._own)
                slot_of_token = slots_of_tokens(expert_of_token, exchange.send, found.replica)
                pushes = Pushes.of(found.replica, self._num_own, self._comm.rank)
                key = (name, _digest_of(found.replica.numpy()))
                loan = Loan(f"layer {shown(layer)}", key, pushes, self._num_replicas, sample)
                step = Dispatch(layer, found, exchange, slot_of_token, loan, sample)
        if sample is not None:
            if not again:
                with self._stages.stage("sample"):
                    assert self._sampler is not None
                    sample.counted = counted
                    self._sampler.take(sample, torch.from_numpy(counts), found)
            sample.begin("dispatch")
        return step

    def push(self, step: Dispatch, *home_rows: Tensor) -> None:
        """Begin to push the replicas now, so that they travel beside the tokens; else `compute` does it.

        Args:
            step: what `dispatch` returned.
            home_rows: as for `compute`.
        """
        if step.loan is not None:
            with self._stages.stage("push", step.sample):
                self._agree_on_weights(step.layer, home_rows)
            self._lender.start(step.loan, home_rows)

    def compute(self, step: Dispatch, experts: Experts, rows: Tensor, *home_rows: Tensor) -> Tensor:
        """Compute the rows that arrived, with replicas where the step has some. Collective.

        Args:
            step: what `dispatch` returned.
            experts: a function of the rows `[X, ...]`, the own rows `[G, ...]` of each tensor of `home_rows`, and their
                replica rows `[R, ...]` (`[0, ...]` if the step is trivial). Replica rows without an expert hold any
                values and get no tokens. It is called on every rank, also for no rows.
            rows: `[X, ...]`, in the order of `step.receive`.
            home_rows: `[G, ...]` each, the weights of this GPU's experts; local tensors, contiguous.

        Raises:
            DistplbError: for weights that differ between ranks in shape or dtype.
            LostRanksError: if ranks do not answer; also from the backward.
        """
        loan, sample = step.loan, step.sample
        if sample is not None:
            sample.end("dispatch")
        if loan is None:
            replicas = [one.detach()[:0] for one in home_rows]
            return _computed_at_home(sample, experts, rows, home_rows, replicas)
        if loan.is_computed:
            raise DistplbError(f"this step of {loan.layer} was computed already; call compute once after each dispatch")
        if not loan.replica_rows:
            self.push(step, *home_rows)
        return lent(self._lender, loan, experts, rows, home_rows)

    def _refuse_other_sizes(self, on_event: OnEvent | None) -> tuple[bool, float]:
        """Compare P among ranks before the first count, whose rows have to be of one length to say anything else.

        Returns:
            Whether any rank wants events; the time on rank 0, in seconds since 1970.
        """
        own = [self._num_slots, int(on_event is not None), time.time_ns()]
        sizes, wanted, now = self._comm.all_gather(torch.tensor(own, device=self._comm.device)).T.tolist()
        for rank, size in enumerate(sizes):
            if size != sizes[0]:
                raise DistplbError(
                    f"num_experts is {size} on rank {rank} and {sizes[0]} on rank 0; pass the same on all ranks of the "
                    "group"
                )
        return any(wanted), now[0] / 1e9

    def _name_of(self, layer: Hashable) -> int:
        """The digest of a layer's name; hashed once, because that takes as long as a small exchange."""
        name = self._names.get(layer)
        if name is None:
            name = self._names[layer] = name_digest(layer)
            self._layers[name] = layer
        return name

    def _split(self, counts: Tensor) -> Split:
        return split(counts, self._home, topology=self._topology, **self._options)

    def _is_surely_trivial(self, counts: Array) -> bool:
        """Whether no replica pays, by the loads of the GPUs alone; with a time curve, `split` has to tell."""
        if self._options["time_curve"] is not None:
            return False
        load = np.add.reduce(np.add.reduce(counts, 0).reshape(-1, self._num_own), 1)
        return is_surely_trivial(
            load, tolerance=self._tolerance, inside=self._inside, cap=self._options["max_tokens_per_gpu"]
        )

    def _remember(self, layer: Hashable, counted: int) -> None:
        seen = self._seen[layer]
        seen.pop(counted, None)
        seen[counted] = None
        if len(seen) > _REMEMBERED:
            del seen[next(iter(seen))]

    def _at_home(
        self, layer: Hashable, found: Split | None, expert_of_token: Tensor, counts: Array, sample: Sample | None
    ) -> Dispatch:
        gpu, own = self._comm.rank, self._num_own
        send, receive = (np.zeros((len(counts), own + self._num_replicas), np.int64) for _ in range(2))
        send[:, :own], receive[:, :own] = counts[gpu].reshape(-1, own), counts[:, gpu * own : (gpu + 1) * own]
        exchange = Exchange(torch.from_numpy(send), torch.from_numpy(receive))
        ids = expert_of_token.to(torch.int64)
        if ids.is_cpu:  # NumPy takes at most half as long
            slot_of_token = torch.from_numpy(self._own_slots.numpy().take(ids.numpy()))
        else:
            slot_of_token = self._own_slots.take(ids)
        return Dispatch(layer, found, exchange, slot_of_token, sample=sample)

    def _agree_on_weights(self, layer: Hashable, home_rows: Sequence[Tensor]) -> None:
        """Compare weights among all ranks, the first time that a layer pushes some of these shapes and dtypes."""
        tensors = [rows for rows in home_rows if isinstance(rows, Tensor) and rows.is_contiguous()]
        shapes = tuple((rows.shape, rows.dtype) for rows in tensors)
        if len(tensors) == len(home_rows) and shapes in self._shapes[layer]:
            return
        head = Row(self._calls, name_digest(layer), self._digest, is_in_backward(), torch.is_grad_enabled())
        row = head.of_weights(home_rows, self._num_slots, self._num_own)
        refuse_weights(self._comm, row, self._num_own, self._layers)
        self._shapes[layer].add(shapes)


def _computed_at_home(
    sample: Sample | None, experts: Experts, rows: Tensor, home_rows: Sequence[Tensor], replicas: Sequence[Tensor]
) -> Tensor:
    """What the experts compute in a step without replicas."""
    if sample is None:
        return experts(rows, home_rows, replicas)
    with sample.part("experts"):
        computed = experts(rows, home_rows, replicas)
    sample.watch_backward(computed, rows)
    return computed


def _digest_of(values: Array) -> int:
    return digest(values.tobytes())
