"""What the ranks of an EP group exchange in a step: conformance, groups of every kind, and who hears of a failure.

Shapes: M ranks.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from inspect import signature
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of, on_ranks, outcomes_on_ranks
from torch.distributed.device_mesh import init_device_mesh

from distplb.comm.base import Message
from distplb.comm.steps import StepComm, StepOfOne, TorchStepComm
from distplb.comm.torchdist import TorchComm
from distplb.errors import DistplbError, LostRanksError

ROUNDS = 40
NEEDS_GPUS = "needs {} GPU{}: NCCL has no CPU backend"


def steps_conform(comm: StepComm, between: Callable[[int], None] = lambda _: None, rounds: int = ROUNDS) -> None:
    """Check many rounds of all calls, with results that only the right ranks in the right order give.

    Args:
        comm: all its ranks call this.
        between: called before each wait, with the round's number: messages of somebody else.
        rounds: how many.
    """
    rank, size, device = comm.rank, comm.size, comm.device
    for nth in range(rounds):
        mine = torch.arange(5, device=device) + 100 * nth + 10**12 * rank
        transfer, check = started(comm, nth)  # on its way while the collectives run
        between(nth)
        rows = comm.all_gather(mine)
        assert rows.device.type == "cpu"
        assert rows.dtype == torch.int64
        assert rows.tolist() == [[100 * nth + i + 10**12 * source for i in range(5)] for source in range(size)]
        between(nth)
        transfer.wait()
        check()


def messages_between(source: int, target: int, nth: int) -> int:
    """How many a round has: 0 to 3, other in each direction, and none at all to or from one rank in every third."""
    return 0 if source == target or nth % 3 == max(source, target) % 3 else (source + 2 * target + nth) % 4


def message(source: int, target: int, nth: int, which: int, device: torch.device) -> torch.Tensor:
    """Of other sizes and types; two of one pair have the same size, so that only their order tells them apart."""
    size = 1 + (which // 2) * 1000 + 7 * source + target
    value = 1000 * nth + 100 * source + 10 * target + which
    return torch.full((size,), value, dtype=torch.float64 if which % 2 else torch.int32, device=device)


def started(comm: StepComm, nth: int) -> tuple[Any, Callable[[], None]]:
    """Start the messages of a round; the second value checks what has arrived."""
    sends: list[Message] = []
    receives: list[Message] = []
    expected = []
    for other in range(comm.size):
        for which in range(messages_between(comm.rank, other, nth)):
            sends.append((message(comm.rank, other, nth, which, comm.device), other))
        for which in range(messages_between(other, comm.rank, nth)):
            wanted = message(other, comm.rank, nth, which, comm.device)
            receives.append((torch.zeros_like(wanted), other))
            expected.append(wanted)

    def check() -> None:
        for (arrived, _), wanted in zip(receives, expected, strict=True):
            assert torch.equal(arrived, wanted)

    return comm.start(sends, receives), check


# --- conformance ------------------------------------------------------------------------------------------------


def beside_the_users_messages() -> int:
    """The framework's all-to-all and messages of one size go between the same ranks, on the user's group."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def between(nth: int) -> None:
        found = torch.zeros(size, dtype=torch.int64)
        dist.all_to_all_single(found, torch.full((size,), 10 * nth + rank))
        assert found.tolist() == [10 * nth + source for source in range(size)]
        if size > 1:
            arrived = torch.zeros(1 + (rank - 1) % size, dtype=torch.int32)
            ways = [
                dist.P2POp(dist.isend, torch.full((1 + rank,), -nth, dtype=torch.int32), (rank + 1) % size),
                dist.P2POp(dist.irecv, arrived, (rank - 1) % size),
            ]
            for work in dist.batch_isend_irecv(ways):
                work.wait()
            assert arrived.unique().tolist() == [-nth]

    comm = TorchStepComm()
    steps_conform(comm, between)
    return comm.size


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_gloo_conforms_beside_the_messages_of_a_framework(ranks: int) -> None:
    assert on_ranks(ranks, beside_the_users_messages) == [ranks] * ranks


def crossing() -> list[float]:
    """Rank 0 sends the user's message first, rank 1 receives distplb's first; collectives cross likewise."""
    comm, other = TorchStepComm(deadline=20), 1 - dist.get_rank()
    users, ours = (torch.full((3,), value) for value in (1.0, 2.0))
    if comm.rank == 0:
        works: list[Any] = [dist.isend(users, other), dist.all_reduce(users.clone(), async_op=True)]
        comm.start([(ours, other)], []).wait()
        rows = comm.all_gather(torch.tensor([5, 6, 7]))
    else:
        transfer = comm.start([], [(ours.zero_(), other)])
        rows = comm.all_gather(torch.tensor([5, 6, 7]))
        works = [dist.irecv(users.zero_(), other), dist.all_reduce(torch.ones(3), async_op=True)]
        transfer.wait()
    for work in works:
        work.wait()
    return [float(users[0]), float(ours[0]), float(rows.sum())]


def test_messages_do_not_meet_those_of_the_user() -> None:
    """On one group, messages and collectives would be paired in the order in which ranks happen to make them."""
    assert on_ranks(2, crossing) == [[1.0, 2.0, 36.0]] * 2


def test_a_group_of_one_conforms_and_needs_no_group() -> None:
    comm = StepOfOne()
    steps_conform(comm)
    row = torch.tensor([3, 4])
    assert comm.all_gather(row).tolist() == [[3, 4]]
    comm.tell(ValueError("nobody hears it"))
    steps_conform(comm, rounds=1)


def over_groups_of_every_kind() -> list[int]:
    """Groups of other ranks side by side, axes of a mesh, groups whose order or number differs by rank."""
    rank = dist.get_rank()
    own = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    comms = [TorchStepComm(own)]
    for axes in ("edp ep", "ep edp"):
        mesh = mesh_of(axes)
        comms += [TorchStepComm(mesh["ep"]), TorchStepComm(mesh["edp"])]
    three = dist.new_group([0, 1, 3])
    if rank != 2:
        comms.append(TorchStepComm(three))
    comms.append(TorchStepComm())
    comms.append(TorchStepComm(own))  # a second one over the same ranks
    for nth in range(6):  # all in turn, so that a message of one would be seen in another
        for comm in comms:
            steps_conform(comm, rounds=nth + 1)
    return [comm.rank for comm in comms]


def test_groups_side_by_side_conform() -> None:
    found = on_ranks(4, over_groups_of_every_kind)
    assert [ranks[0] for ranks in found] == [0, 0, 1, 1]
    assert [ranks[-2] for ranks in found] == [0, 1, 2, 3]


def in_groups_of_other_numbers() -> list[Any]:
    """Rank 0 is in three groups that the others are not in, rank 1 in one of them."""
    before = [dist.new_group([0]), dist.new_group([0, 1]), dist.new_group([0, 2])]
    half = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    comms = [TorchStepComm(half, deadline=30), TorchStepComm(deadline=30)]
    for comm in comms:
        steps_conform(comm, rounds=3)
    side = TorchComm(half, deadline=30, side_group=True)
    value = torch.ones(1)
    side.all_reduce_sum(value)
    return [len(before), value.item()]


def test_ranks_in_different_numbers_of_groups_find_each_other() -> None:
    """torch names a group after that number, so the ranks waited for each other until torch's timeout."""
    assert on_ranks(4, in_groups_of_other_numbers) == [[3, 2.0]] * 4


def in_another_order() -> list[int]:
    group = dist.new_group([2, 0, 1], sort_ranks=False)
    comm = TorchStepComm(group)
    steps_conform(comm, rounds=3)
    assert comm.rank == dist.get_rank(group)
    return comm.global_ranks


def test_the_order_of_ranks_is_that_of_the_group() -> None:
    """The new group's ranks were sorted, so GPU 0 of the topology was another rank than the group's first."""
    if "sort_ranks" not in signature(dist.new_group).parameters:
        pytest.skip("this torch sorts the ranks of every group")
    assert on_ranks(3, in_another_order) == [[2, 0, 1]] * 3


def refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "expert"))
    alone = [dist.new_group([0]), dist.new_group([1])]
    found = []
    for arguments in ({"group_or_mesh": mesh}, {"group_or_mesh": alone[1 - dist.get_rank()]}, {"deadline": -1.0}):
        with pytest.raises(DistplbError) as caught:
            TorchStepComm(**arguments)
        found.append(str(caught.value))
    return found


def test_groups_and_deadlines_that_do_not_fit_are_refused() -> None:
    for rank, (axes, other, deadline) in enumerate(on_ranks(2, refusals)):
        assert axes.startswith("the mesh has 2 axes ('data', 'expert'); pass one of them")
        assert other == f"global rank {rank} is not in the group; pass a group that contains it"
        assert deadline == "deadline is -1.0; pass a positive number of seconds"


# --- who hears of a failure, and when ---------------------------------------------------------------------------

DEADLINE = 120.0  # longer than the tests may take: who hears only then has not answered


def told(waits_for: str) -> list[str]:
    """Rank 0 waits for rank 1, which fails outside of any call. Then both call again."""
    comm = TorchStepComm(deadline=DEADLINE)
    comm.all_gather(torch.zeros(1, dtype=torch.int64))
    calls: dict[str, Callable[[], Any]] = {
        "all_gather": lambda: comm.all_gather(torch.zeros(1, dtype=torch.int64)),
        "message": lambda: comm.start([], [(torch.zeros(3), 1)]).wait(),
        "sent message": lambda: comm.start([(torch.zeros(1 << 24), 1)], []).wait(),
        "no message": lambda: comm.start([], []).wait(),
    }
    found = []
    if comm.rank == 1:
        comm.tell(ValueError("not mine"))
    for name in (*([waits_for] if comm.rank == 0 else []), *calls):
        try:
            calls[name]()
        except LostRanksError as error:
            found.append(str(error))
    dist.barrier()  # nobody ends before: that would close connections, from which others hear too
    return found


@pytest.mark.parametrize("waits_for", ["all_gather", "message", "sent message"])
def test_a_rank_that_waits_hears_of_a_failure_before_its_deadline(waits_for: str) -> None:
    """Waits for messages are not cut into slices, so they lasted until the deadline."""
    waiting, failed = on_ranks(2, told, waits_for, deadline=15)
    assert len(waiting) == 5
    assert len(set(waiting)) == 1, "after a loss, every call raises the same at once"
    assert waiting[0].startswith("a collective failed (waited ")
    assert "; rank 1 failed: not mine" in waiting[0]
    assert len(failed) == 4
    assert failed[0].startswith(
        "a collective failed (an earlier call failed on this rank: not mine); stop this process"
    )


def told_by_one_of_three() -> Any:
    """Rank 2 fails; rank 0 waits for rank 1, which computes and comes to no call."""
    comm = TorchStepComm(deadline=DEADLINE)
    comm.all_gather(torch.zeros(1, dtype=torch.int64))
    if comm.rank == 2:
        comm.tell(ValueError("mine"))
    if comm.rank:
        dist.barrier()  # in a call of the framework
        return None
    with pytest.raises(LostRanksError) as caught:
        comm.start([], [(torch.zeros(3), 1)]).wait()
    dist.barrier()
    return str(caught.value), caught.value.missing


def test_a_told_error_is_not_held_up_by_ranks_that_compute() -> None:
    """A rank that had heard of an error waited until its deadline for ranks that only wait in a framework's call."""
    text, missing = on_ranks(3, told_by_one_of_three, deadline=15)[0]
    assert "; rank 2 failed: mine; no word so far from rank 1); stop this process" in text
    assert missing == ()


def late_messages() -> list[float]:
    """Messages that arrive after many looks at the store, while nobody has failed."""
    comm = TorchStepComm(deadline=4.0)  # looks every half second
    found = []
    for late in (0, 1):
        if comm.rank == late:
            time.sleep(1.5)
        arrived = torch.zeros(3)
        comm.start([(torch.full((3,), float(comm.rank + 1)), 1 - comm.rank)], [(arrived, 1 - comm.rank)]).wait()
        found.append(float(arrived[0]))
    return found


def test_a_late_message_is_waited_for() -> None:
    assert on_ranks(2, late_messages) == [[2.0] * 2, [1.0] * 2]


def watchers() -> tuple[int, int]:
    def alive() -> int:
        return sum(thread.name == "distplb-watch" for thread in threading.enumerate())

    comm = TorchStepComm(deadline=0.4)  # looks every 0.05 s
    other = 1 - comm.rank
    for _ in range(5):
        comm.start([(torch.zeros(3), other)], [(torch.zeros(3), other)]).wait()
    before = alive()
    dist.barrier()
    del comm
    gc.collect()
    end = time.monotonic() + 10
    while alive() and time.monotonic() < end:
        time.sleep(0.05)
    return before, alive()


def test_the_thread_that_looks_ends_with_its_communicator() -> None:
    assert on_ranks(2, watchers) == [(1, 0)] * 2


# --- NCCL: what can be shown without a GPU ----------------------------------------------------------------------


def kernel_that_hangs(deadline: float, fails: bool) -> str:
    """Rank 0 waits for a kernel that does not end; rank 1 tells of a failure, or does nothing."""
    comm = TorchStepComm(deadline=deadline)
    comm.all_gather(torch.zeros(1, dtype=torch.int64))
    if comm.rank == 0:
        comm._wait_until(lambda: False, time.monotonic(), listens=True)
    if fails:
        comm.tell(ValueError("mine"))
    return "lives"


@pytest.mark.parametrize(("deadline", "fails"), [(2.0, False), (DEADLINE, True)])
def test_a_kernel_that_hangs_ends_the_process(deadline: float, fails: bool) -> None:
    hung, other = outcomes_on_ranks(2, kernel_that_hangs, deadline, fails, deadline=15)
    assert hung == (False, "ended without an answer")
    assert other == (True, "lives")


def created_groups() -> list[tuple[str, float]]:
    """Backends and timeouts of the groups that are created."""
    dist.Backend.register_backend("standin", dist.ProcessGroupGloo, devices=["cpu", "cuda"])
    seen, new_group = [], dist.new_group

    def watched(*args: Any, backend: str, timeout: timedelta, **options: Any) -> Any:
        seen.append((backend, timeout.total_seconds()))
        return new_group(*args, backend=backend, timeout=timeout, **options)

    dist.new_group = watched  # type: ignore[assignment]
    for backend in ("gloo", "cpu:gloo", "cpu:gloo,cuda:standin"):
        steps_conform(TorchStepComm(new_group(backend=backend), deadline=20), rounds=2)
    return seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU a group for it is on it")
def test_the_new_group_has_the_backends_of_the_users() -> None:
    expected = [("cpu:gloo,cuda:gloo", 20.0), ("cpu:gloo", 20.0), ("cpu:gloo,cuda:standin", 20.0)]
    assert on_ranks(2, created_groups) == [expected] * 2


# --- NCCL: what needs GPUs ----------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason=NEEDS_GPUS.format(1, ""))
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl", None])
@pytest.mark.parametrize("is_bound", [False, True])
def test_nccl_conforms_at_world_1(tmp_path: Any, backend: str | None, is_bound: bool) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    bound = {"device_id": device} if is_bound else {}
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1, **bound)
    try:
        comm = TorchStepComm()
        steps_conform(comm)
        assert comm.device.type == "cuda"
    finally:
        dist.destroy_process_group()


def over_nccl(backend: str) -> str:
    torch.cuda.set_device(dist.get_rank())
    comm = TorchStepComm(dist.new_group(backend=backend))
    steps_conform(comm)
    other = 1 - comm.rank
    product = torch.ones(4096, 4096, device="cuda")
    for _ in range(20):  # what is sent is computed on the current stream, and overwritten after the wait
        product = product @ product / 4096
        arrived = torch.zeros_like(product)
        comm.start([(product, other)], [(arrived, other)]).wait()
        product.zero_().add_(arrived)
    assert product.unique().tolist() == [1.0]
    return comm.device.type


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=NEEDS_GPUS.format(2, "s"))
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_nccl_conforms_on_two_gpus(backend: str) -> None:
    assert on_ranks(2, over_nccl, backend) == ["cuda"] * 2


def message_that_hangs() -> None:
    """Rank 1 never sends what rank 0 receives; both go on to the next count."""
    torch.cuda.set_device(dist.get_rank())
    comm = TorchStepComm(dist.new_group(backend="nccl"), deadline=5.0)
    if comm.rank == 0:
        comm.start([], [(torch.zeros(3, device="cuda"), 1)]).wait()  # does not wait for the device
    comm.all_gather(torch.zeros(1, dtype=torch.int64, device="cuda"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=NEEDS_GPUS.format(2, "s"))
def test_a_message_that_hangs_ends_the_process_at_the_next_count() -> None:
    for answer in outcomes_on_ranks(2, message_that_hangs, deadline=30):
        assert answer == (False, "ended without an answer")
