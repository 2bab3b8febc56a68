"""What all adapters share: counts from hooks, and the error for a model that is not understood.

Shapes: P slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from distplb.errors import DistplbError

__all__ = ["Tell", "counts_of", "named_parts", "not_found"]

# Takes a layer's counts [P] of one forward, and `training=`.
Tell = Callable[..., None]


def counts_of(module: nn.Module, read: Callable[[tuple[Any, ...], Any], Tensor]) -> Callable[[Tell], object]:
    """For `MoELayer.counts`: after each forward of a module, the counts that `read(arguments, output)` finds in it.

    Args:
        module: whose forward is watched. Recomputations and evaluations are left to the window to recognise.
        read: from the forward's positional arguments and its output to the counts `[P]`.
    """

    def subscribe(tell: Tell) -> object:
        def hook(watched: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            tell(read(arguments, output), training=watched.training)

        return module.register_forward_hook(hook)

    return subscribe


def named_parts(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """One model, or the parts of one that a pipeline stage holds, as a list."""
    return [model] if isinstance(model, nn.Module) else list(model)


def not_found(framework: str, looked_for: Sequence[str], parts: Iterable[nn.Module]) -> DistplbError:
    """The error for a model without a layer that is understood: what was looked for, and what was found instead.

    Args:
        framework: in words.
        looked_for: what a layer needs, one each.
        parts: of the model.
    """
    suspects = ("moe", "expert", "router", "gate")
    modules = [module for part in parts for module in part.modules()]
    classes = Counter(f"{type(module).__module__}.{type(module).__qualname__}" for module in modules)
    alike = {name: count for name, count in classes.items() if any(word in name.lower() for word in suspects)}
    found = ", ".join(f"{name} × {count}" for name, count in sorted(alike.items()))
    return DistplbError(
        f"no MoE layer of {framework} was understood. Looked for: {'; '.join(looked_for)}. "
        f"Found: {found or 'no module whose class name tells of experts, routers or gates'} "
        f"(of {sum(classes.values())} modules); describe the layers yourself with distplb.MoELayer"
    )
