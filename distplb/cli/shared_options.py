"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from distplb.cli.param_types import NamedPath, WholeNumber
from distplb.core.topology import Topology
from distplb.planning.options import PlanOptions

__all__ = ["option_group", "planning_options"]

_AT_LEAST_1 = WholeNumber()


def _parse_price(_context: click.Context, _parameter: click.Parameter, text: str) -> float | tuple[float, float]:
    """Parse tokens per moved slot: one number, or a pair."""
    try:
        prices = tuple(float(part) for part in text.split(","))
    except ValueError:
        prices = ()
    if len(prices) not in (1, 2) or not all(price >= 0 for price in prices):  # a NaN is refused too
        raise click.BadParameter(f"{text!r} is not a price; pass tokens, at least 0: one number, or INSIDE,BETWEEN")
    return prices[0] if len(prices) == 1 else (prices[0], prices[1])


def option_group(*options: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command these options, in this order in `--help`."""

    def add_options(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add_options


_add_planning_options = option_group(
    click.option("--nodes", type=_AT_LEAST_1, default=1, show_default=True, help="Nodes of the EP group."),
    click.option("--gpus-per-node", type=_AT_LEAST_1, required=True, help="GPUs of the EP group on each node."),
    click.option(
        "--slots",
        type=_AT_LEAST_1,
        help="Slots of all GPUs together; more than experts for replicas. Default: as many as experts.",
    ),
    click.option("--groups", type=_AT_LEAST_1, help="Groups of experts of a group-limited router."),
    click.option(
        "--mode",
        type=click.Choice(["remap", "permute"]),
        default="remap",
        show_default=True,
        help="How the plan will be applied: by a table after the router, or by moving the router's rows too.",
    ),
    click.option(
        "--current",
        type=NamedPath(),
        help="Placement in force, as written by --output or another project; default: contiguous.",
    ),
    click.option(
        "--move-price",
        callback=_parse_price,
        default="0",
        metavar="TOKENS",
        help="Tokens of the whole load that a moved slot must save: one number, or INSIDE,BETWEEN nodes.",
    ),
    click.option("--candidates", type=_AT_LEAST_1, help="Randomised starts per layer; default: 4."),
    click.option("--seed", type=WholeNumber(0), default=0, show_default=True, help="Seed of all random choices."),
    click.option("--engine", help="reference, cpu or cuda; default: the fastest available."),
)


def planning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Pass the options of `distplb.plan` on as `topology` and `options`, and the path of `--current` as `current`."""

    @functools.wraps(command)
    def with_options(
        *,
        nodes: int,
        gpus_per_node: int,
        slots: int | None,
        groups: int | None,
        candidates: int | None,
        seed: int,
        engine: str | None,
        mode: str,
        move_price: float | tuple[float, float],
        **others: Any,
    ) -> Any:
        topology = Topology(nodes, gpus_per_node)
        options = PlanOptions(
            num_slots=slots,
            num_groups=groups,
            num_candidates=candidates,
            seed=seed,
            engine=engine,
            mode=mode,
            move_price=move_price,
        )
        return command(topology=topology, options=options, **others)

    return _add_planning_options(with_options)
