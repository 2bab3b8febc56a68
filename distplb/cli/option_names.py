"""The command-line options of Python arguments, for messages that name one."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["as_option"]

# Arguments whose options have other names; all others keep their name, with dashes.
_OPTIONS: Mapping[str, str] = {
    "num_slots": "slots",
    "num_groups": "groups",
    "num_candidates": "candidates",
    "num_nodes": "nodes",
    "num_gpus": "megatron-ep",  # of Trace.from_megatron
    "expert_tensor_parallel": "megatron-expert-tp",
    "pipeline_parallel": "megatron-pipeline",
}
_PYTHON_ONLY = {"max_bytes"}


def as_option(name: str, value: str) -> str:
    """The option for an argument that `OptionError` names: `--slots`, or `--slots 8` with a value."""
    if name in _PYTHON_ONLY:
        return f"{name} in Python"
    option = f"--{_OPTIONS.get(name, name).replace('_', '-')}"
    if value == "None":
        return f"no {option}"
    return f"{option} {value.strip(chr(39))}".strip()
