"""`plan`: the three calls of a `Problem`, with the collectives between them.

Stages, numbered as in docs/how-it-works.md: (1) count, (2) search, (3) choose, (4) polish, (5) share.
Shapes: T steps, L layers, E experts, P slots, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distplb.comm.agreement import agree, raise_everywhere
from distplb.comm.base import Comm, WorldOfOne, refuse_other_comm
from distplb.core.counts import Counts, as_load, as_tokens
from distplb.core.placement import Placement
from distplb.core.price import TimeCurve
from distplb.core.private_names import fast_range
from distplb.core.stages import Stages
from distplb.core.topology import Topology
from distplb.errors import in_stage
from distplb.packing.noise import CANDIDATE_BITS
from distplb.planning.engine_choice import engine_for
from distplb.planning.options import PlanOptions
from distplb.planning.problem import Problem

__all__ = ["PlanResult", "StagedPlan", "plan", "plan_in_stages"]

_WORST_KEY = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class PlanResult:
    """A placement, the load `[T, L, E]` of all ranks that it was planned from, on the host, and the engine's name."""

    placement: Placement
    load: Tensor
    engine: str


def plan(
    load: Counts,
    topology: Topology,
    *,
    comm: Comm | None = None,
    num_slots: int | None = None,
    num_groups: int | None = None,
    slot_class: Tensor | None = None,
    current: Placement | None = None,
    move_price: float | tuple[float, float] = 0.0,
    time_curve: TimeCurve | None = None,
    num_candidates: int | None = None,
    seed: int = 0,
    engine: str | None = None,
    allow_shared_replicas: bool = True,
    mode: str = "remap",
) -> Placement:
    """Search for the cheapest placement on all ranks together; all of them return the same plan.

    The same load and options give the same plan bit for bit, whatever the number of ranks, the engine and the device.
    The cost of a layer is the busiest GPU's tokens, summed over the steps, plus the price of its moves; replicas share
    their expert's tokens evenly.

    >>> load = torch.tensor([[9, 1, 5, 5]])
    >>> plan(load, Topology(num_nodes=1, gpus_per_node=2)).expert_of_slot
    tensor([[0, 1, 2, 3]])
    >>> plan(torch.tensor([[8, 1, 2, 1]]), Topology(num_nodes=1, gpus_per_node=2), num_slots=6).expert_of_slot
    tensor([[0, 1, 2, 0, 2, 3]])

    Args:
        load: `[L, E]` or `[T, L, E]` tokens of each expert as counted **on this rank**, in any exact type. The counts
            of all ranks are added up, so if one rank already has the total, the others pass zeros. A single rank
            without a price or curve may pass fractional weights.
        topology: topology of one EP group; its number of GPUs divides the slots.
        comm: the ranks that plan together; None for this process alone.
        num_slots: P, at least E; E if None. Slots beyond E hold replicas of hot experts.
        num_groups: groups of consecutive experts of a group-limited router. In mode "remap" each node gets whole
            groups (DeepSeek's hierarchical policy); mode "permute" produces only block permutations.
        slot_class: `[P]` integers; an expert stays in slots of the same class as its present slot. Not with replicas
            or groups.
        current: the placement in force. Odd candidates start from it, the GPUs of a plan are renumbered so that few
            experts move, and a layer keeps it unless a plan costs less, or it breaks a rule of the other options.
        move_price: tokens of the whole window for each slot whose expert comes from another GPU; or a pair, inside a
            node and between nodes. `MoveModel.price` computes it from seconds. Requires `current`.
        time_curve: maps an expert's tokens to its time, which is then balanced instead of tokens; `move_price` stays
            in tokens, converted at the curve's last point.
        num_candidates: K starts per layer, dealt round-robin to the ranks; None for 1, or 4 with `current`. For one
            step of load without a price, K fresh ones are never worse than `balanced_packing` with K.
        seed: seed of all random choices.
        engine: "reference", "cpu" or "cuda"; None for the fastest that is available. "cuda" first runs a trial, once
            per process and load shape; if its plans differ or it fails, this is logged and "cpu" makes the same plans.
        allow_shared_replicas: whether replicas of an expert may share a GPU where that lowers the cost.
        mode: how the plan will be applied. "remap" routes tokens through a table and accepts any plan; "permute" moves
            rows of experts and router, so it has no replicas and keeps groups together in blocks.

    Raises:
        DistplbError: on every rank, if any rank's load or options are refused or differ from the others'.
    """
    refuse_other_comm(comm, moves=False)
    options = PlanOptions(
        num_slots=num_slots,
        num_groups=num_groups,
        slot_class=slot_class,
        current=current,
        num_candidates=num_candidates,
        seed=seed,
        engine=engine,
        allow_shared_replicas=allow_shared_replicas,
        mode=mode,
        move_price=move_price,
        time_curve=time_curve,
    )
    return plan_in_stages(load, topology, WorldOfOne() if comm is None else comm, options).placement


def plan_in_stages(
    load: Counts, topology: Topology, comm: Comm, options: PlanOptions, *, stages: Stages | None = None
) -> PlanResult:
    """`plan` with its options as one value; also returns the load and the engine.

    Args:
        load, topology, comm, options: as for `plan`.
        stages: receives the seconds of each stage.
    """
    staged = StagedPlan(load, topology, comm, options, stages=stages)
    staged.search()
    staged.choose()
    staged.polish()
    return staged.share()


class StagedPlan:
    """A plan in progress, in five stages: the constructor counts; then call `search`, `choose`, `polish` and `share`.

    Counting, choosing and sharing are collective. Searching and polishing are local, may run in another thread, and do
    not raise: the collective that follows raises their error on all ranks.

    Args:
        load, topology, comm, options: as for `plan`.
        stages: receives the seconds of each stage.
        fields: more integers that must be equal on all ranks, checked in the same header.
        error: an error of the caller on this rank; all ranks then raise it instead of planning.
    """

    def __init__(
        self,
        load: Counts,
        topology: Topology,
        comm: Comm,
        options: PlanOptions,
        *,
        stages: Stages | None = None,
        fields: Mapping[str, int] | None = None,
        error: Exception | None = None,
    ) -> None:
        self._topology, self._comm, self._options = topology, comm, options
        self._stages = Stages(fast_range) if stages is None else stages
        self._error: Exception | None = None
        with self._stages.stage("count"):
            self._load = _agreed_load(load, topology, comm, options, dict(fields or {}), error)
            comm.all_reduce_sum(self._load)
        _, num_layers, num_experts = self._load.shape
        # A negative entry means that a rank failed, and encodes which one.
        self._key = torch.full((num_layers,), -1 - comm.rank, device=self._load.device)
        self._table = torch.full((num_layers, options.slots(num_experts)), -1, device=comm.device)

    @cached_property
    def load(self) -> Tensor:
        """`[T, L, E]` of all ranks, on the host; the first access copies it and waits for the device."""
        return self._load.to("cpu")

    def search(self) -> None:
        """(2) Search this rank's share of the candidates."""
        with self._stages.stage("search"):
            try:
                steps, layers, experts = self._load.shape
                engine = engine_for(self._options, self._topology, (steps, layers, experts), self._load.device)
                self._problem = Problem(self._load, self._topology, self._options, engine)
                self._key = _best_keys(self._problem, self._options.candidates, self._comm, self._load)
            except Exception as caught:
                self._error = in_stage("search", caught)

    def choose(self) -> None:
        """(3) Choose the best candidate of every layer over all ranks."""
        with self._stages.stage("choose"):
            self._comm.all_reduce_min(self._key)
            worst = int(self._key.min())
            if worst < 0:
                raise_everywhere(self._comm, -1 - worst, self._error)
            self._engine_name = self._problem.engine_name
            if self._comm.rank != 0:
                del self._problem  # freed while the root polishes, not later, when all ranks would wait for it

    def polish(self) -> None:
        """(4) Refine the winners on the root; a no-op on other ranks."""
        with self._stages.stage("polish"):
            if self._comm.rank != 0:
                return
            try:
                best = self._problem.build(self._key & ((1 << CANDIDATE_BITS) - 1))
                self._table = self._problem.polish(best).to(self._comm.device)
            except Exception as caught:
                self._error = in_stage("polish", caught)

    def share(self) -> PlanResult:
        """(5) Send the root's placement to all ranks."""
        with self._stages.stage("share"):
            self._comm.broadcast(self._table, 0)
            failed = self._error is not None if isinstance(self._comm, WorldOfOne) else int(self._table.min()) < 0
            if failed:
                raise_everywhere(self._comm, 0, self._error)
            placement = Placement(self._table, self._load.shape[2], self._topology.num_gpus)
        return PlanResult(placement, self.load, self._engine_name)


def _agreed_load(
    load: Counts,
    topology: Topology,
    comm: Comm,
    options: PlanOptions,
    fields: dict[str, int],
    error: Exception | None,
) -> Tensor:
    """This rank's tokens `[T, L, E]` on the communicator's device, after all ranks have agreed on everything else."""
    is_alone = isinstance(comm, WorldOfOne)
    if not is_alone:
        fields |= dict.fromkeys(_LOAD_FIELDS, 0) | dict.fromkeys(PlanOptions().fields(0), 0)
    try:
        if error is not None:
            raise error
        # A load that ranks add up, or that has a price or a curve in tokens, must be tokens.
        is_free = isinstance(options.move_price, int | float) and options.move_price == 0
        has_unit = comm.size > 1 or not is_free or options.time_curve is not None
        tokens = as_tokens(load) if has_unit else as_load(load)
        steps, num_layers, num_experts = tokens.shape
        options.check(topology, num_layers, num_experts)
        if not is_alone:  # one process agrees with itself; digests of long options would take it longer than the search
            values = (steps, num_layers, num_experts, topology.num_nodes, topology.gpus_per_node)
            fields |= dict(zip(_LOAD_FIELDS, values, strict=True)) | options.fields(num_experts)
        # With one rank, the search stays on the device of the counts.
        tokens = _copied(tokens, tokens.device if is_alone else comm.device)
    except Exception as caught:  # even out of memory, before other ranks wait for these counts
        error = in_stage("count", caught)
    if not is_alone or error is not None:
        agree(comm, fields, error)
    return tokens


def _copied(tokens: Tensor, device: torch.device) -> Tensor:
    return tokens.to(device, copy=True).contiguous()


_LOAD_FIELDS = ("the load's steps", "the load's layers", "the load's experts", "num_nodes", "gpus_per_node")


def _best_keys(problem: Problem, num_candidates: int, comm: Comm, tokens: Tensor) -> Tensor:
    """`[L]` int64: the smallest `cost << 22 | candidate` of each layer over this rank's share of the candidates."""
    mine = torch.arange(num_candidates, device=tokens.device)[comm.rank :: comm.size]
    if not len(mine):  # more ranks than candidates
        return torch.full((tokens.shape[1],), _WORST_KEY, device=tokens.device)
    return (problem.costs(mine) << CANDIDATE_BITS | mine[:, None]).amin(0)
