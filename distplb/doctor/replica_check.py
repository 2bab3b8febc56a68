"""Checks a training step with replicas, forward and backward: timed, and equal to the bit to what it has to compute.

Shapes: N tokens of this rank, K experts of each token, D dim, H hidden, G own and R replica slots of each GPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distplb.comm.steps import StepComm, TorchStepComm
from distplb.core.topology import Topology
from distplb.doctor.collective_checks import wait_for_device
from distplb.doctor.finding import Finding, Timing, ok, wrong
from distplb.doctor.known_step import DIM, HIDDEN, LAYERS, SLOTS_PER_GPU, Answer, KnownStep
from distplb.doctor.lent_layer import through_layer
from distplb.replicas.step_balancer import Dispatch, StepBalancer
from distplb.splitting.split_value import Split

__all__ = ["step_with_replicas"]

_ROUNDS = 4  # the first one is not timed
_MIB = 1 << 20
_EXPERT_BYTES = 2 * DIM * HIDDEN * 4
_BUG = "do not lend replicas in this environment, and report this as a bug of distplb"
_NETWORK = "experts without replicas are wrong too, so check the GPUs, the network and its driver first"


def step_with_replicas(topology: Topology, deadline: float) -> Iterator[Timing | Finding]:
    """Lend replicas of hot experts among the default group in a step of three layers; time it, and check its results.

    Collective. Each rank tells what is wrong with its own results.

    Args:
        topology: of the default group.
        deadline: seconds that ranks may wait for each other.

    Raises:
        DistplbError: on all ranks, with the reason, if one rank refuses; or if ranks are lost.
    """
    network = TorchStepComm(deadline=deadline)
    try:
        balancer = StepBalancer(
            topology=topology,
            num_experts=SLOTS_PER_GPU * topology.num_gpus,
            deadline=deadline,
            # Where nodes have one GPU, there would be no replica if none left its node.
            push_price=(0.0, 0.0 if topology.gpus_per_node == 1 else math.inf),
        )
        known = KnownStep(topology, network.rank, network.device)
        layers = [_layer(known, number) for number in range(LAYERS)]
        rounds = [_round(layers, balancer, network) for _ in range(_ROUNDS)]
    except Exception as error:
        network.tell(error)  # to ranks that wait for rows of this one
        raise
    splits = [split for split in rounds[-1].splits if split is not None and not split.is_trivial]
    if len(splits) < LAYERS:  # on all ranks alike
        yield wrong("replicas", f"none was lent in {LAYERS - len(splits)} of {LAYERS} uneven layers; {_BUG}")
        return
    yield from _timings(rounds[1:], splits, network)
    yield ok("replicas", _evened_out(splits, topology))
    yield from _wrong(rounds)


# --- the step ---------------------------------------------------------------------------------------------------


# How many results are wrong: what of what, and whether replicas took part in them.
_NumWrong = Counter[tuple[tuple[str, str], bool]]


class _Layer(NamedTuple):
    """What goes into a layer on this rank, and what has to come out."""

    name: str
    slots: Tensor  # [N, K]
    rows: Tensor  # [N, D]
    gradient: Tensor  # [N, D], of the outputs
    weights: tuple[Tensor, Tensor]  # [G, D, H] and [G, H, D]
    answer: Answer
    own_slots: Tensor  # [G]


class _Round(NamedTuple):
    """One forward and backward on this rank."""

    seconds: dict[str, float]  # of the step, and of its parts
    splits: list[Split | None]  # of the layers
    num_wrong: _NumWrong


def _layer(known: KnownStep, number: int) -> _Layer:
    w_in, w_out = known.own_weights(number)
    return _Layer(
        f"layer {number}",
        known.slot_of_token(number),
        known.rows(number).requires_grad_(),
        known.gradient(number),
        (w_in.requires_grad_(), w_out.requires_grad_()),
        known.answer(number),
        torch.tensor(known.own_slots, device="cpu"),
    )


def _round(layers: Sequence[_Layer], balancer: StepBalancer, network: StepComm) -> _Round:
    """Run a forward and a backward of all layers, and compare the results. Collective."""
    before, outputs, steps = balancer.seconds, list[Tensor](), list[Dispatch]()
    for layer in layers:
        for leaf in (layer.rows, *layer.weights):
            leaf.grad = None
    wait_for_device(network.device)
    began = time.perf_counter()
    for layer in layers:
        # Adds nothing, but orders the layers: each waits for the one before, and in the backward for the one behind.
        rows = layer.rows + outputs[-1][:0].sum() if outputs else layer.rows
        output, step = through_layer(balancer, network, layer.name, layer.slots, rows, layer.weights)
        outputs.append(output)
        steps.append(step)
    torch.autograd.backward(outputs, [layer.gradient for layer in layers])
    wait_for_device(network.device)
    seconds = {"step": time.perf_counter() - began}
    seconds |= {stage: total - before.get(stage, 0.0) for stage, total in balancer.seconds.items()}
    num_wrong = _NumWrong()
    for layer, output, step in zip(layers, outputs, steps, strict=True):
        num_wrong += _compared(layer, output.detach(), step)
    return _Round(seconds, [step.split for step in steps], num_wrong)


def _compared(layer: _Layer, output: Tensor, step: Dispatch) -> _NumWrong:
    """Compare the results of a layer with the answer."""
    answer, (w_in, w_out), device = layer.answer, layer.weights, output.device
    is_by_replica = step.slot_of_token.remainder(step.receive.shape[1]).ge(SLOTS_PER_GPU).any(1)  # [N]
    replica = step.split.replica if step.split is not None else layer.own_slots[:0]
    has_replica = torch.isin(layer.own_slots, replica).to(device)  # [G]
    of_weights = _differs(w_in.grad, answer.w_in) | _differs(w_out.grad, answer.w_out)  # [G]
    results = [
        (("outputs", "tokens"), _differs(output, answer.outputs), is_by_replica),
        (("gradients", "tokens"), _differs(layer.rows.grad, answer.rows), is_by_replica),
        (("gradients", "experts"), of_weights, has_replica),
    ]
    return Counter(
        {
            (what, lent): int((differs & (mask == lent)).sum())
            for what, differs, mask in results
            for lent in (True, False)
        }
    )


def _differs(result: Tensor | None, answer: Tensor) -> Tensor:
    """`[n]` bool, the rows that are not equal to the bit; all, if there is no result."""
    if result is None:
        return torch.ones(len(answer), dtype=torch.bool, device=answer.device)
    return result.ne(answer).flatten(1).any(1)


# --- what it tells ----------------------------------------------------------------------------------------------


def _timings(rounds: Sequence[_Round], splits: Sequence[Split], network: StepComm) -> Iterator[Timing]:
    """Medians of the step and of distplb's parts, with the bytes of replicas that this rank sends and receives."""
    median = {part: statistics.median(one.seconds[part] for one in rounds) for part in rounds[0].seconds}
    yield Timing(f"step of {LAYERS} layers with replicas, forward and backward", None, median["step"])
    yield Timing("- count and split", None, median["count"] + median["split"])
    pushes = [split.pushes for split in splits]  # [M, M] each
    replicas = [int(one[network.rank].sum() + one[:, network.rank].sum()) for one in pushes]
    # Replicas of the last layer are still there when the backward begins.
    for stage, number in (("push", sum(replicas)), ("push again", sum(replicas[:-1])), ("bring home", sum(replicas))):
        size = number * _EXPERT_BYTES
        if network.device.type == "cuda":  # where the host does not wait for the messages
            yield Timing(f"- {stage}, {size // _MIB} MiB: the host's part", None, median[stage])
        else:
            yield Timing(f"- {stage}, {size // _MIB} MiB", size, median[stage])


def _evened_out(splits: Sequence[Split], topology: Topology) -> str:
    """How many replicas were lent, and what they did, in words."""
    number, before = sum(split.num_replicas for split in splits), max(map(_at_home, splits))
    after = max(split.imbalance for split in splits)
    text = f"{number} lent in {LAYERS} layers; imbalance {before:.2f} without them, {after:.2f} with them"
    if topology.num_nodes == 1:
        return text
    if topology.gpus_per_node == 1:
        return f"{text}; here between nodes, where StepBalancer lends none unless you pass push_price"
    return f"{text}, which even out the GPUs of a node, but not nodes"


def _at_home(split: Split) -> float:
    """The imbalance if all tokens were computed at home."""
    load = torch.zeros_like(split.load).index_add_(0, split.home, split.counts.sum(0))
    return int(load.amax()) * len(load) / int(load.sum())


def _wrong(rounds: Sequence[_Round]) -> Iterator[Finding]:
    """What arrived wrong on this rank, in the worst round."""
    worst = _NumWrong()
    for one in rounds:
        worst |= one.num_wrong
    for what in dict.fromkeys(what for what, _ in worst):
        lent, other = worst[what, True], worst[what, False]
        (result, unit), remedy = what, _NETWORK if other else _BUG
        by = "with" if unit == "experts" else "computed by"
        yield wrong(
            "replicas", f"the {result} of {lent + other} {unit} are wrong, {lent} of them {by} replicas; {remedy}"
        )
