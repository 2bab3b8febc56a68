"""Runs the kernels of engine `cuda` in Triton's interpreter, in a child process, and checks each address they use.

A kernel that writes outside its tensors may give right results in an interpreter, and corrupt memory on a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from distplb.packing import cuda

__all__ = ["prepare", "printed_by"]

_SECONDS = 400.0


def printed_by(module: str, function: str, *arguments: object) -> Any:
    """Call a function of a test module in a child in which Triton interprets; return the last line printed, as JSON.

    It cannot run in this process, because TRITON_INTERPRET must be set before Triton is imported.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    if not hasattr(interpreter.InterpreterBuilder, "get_int1_ty"):  # missing in Triton 3.2 (of torch 2.6) and 3.3
        pytest.skip("this Triton's interpreter cannot join a condition to one that is False; its compiler can")
    run = subprocess.run(
        [sys.executable, "-c", f"import {module}; {module}.{function}(*{arguments!r})"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def prepare() -> None:
    """Prepare the child, or a rank of it: the interpreter patches Triton only once, and checks each address."""
    torch.set_num_threads(1)
    interpreter = importlib.import_module("triton.runtime.interpreter")
    _patch_once(interpreter)
    _guard(interpreter)


def _patch_once(interpreter: Any) -> None:
    """Patch Triton's language once, not at each call inside a kernel, which takes two thirds of the time."""
    from distplb.packing import cuda_kernels

    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang(cuda_kernels.greedy_kernel.fn)
        interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()


def _guard(interpreter: Any) -> None:
    """Raise if a kernel reads or writes an address outside its tensors."""
    builder, launch = interpreter.InterpreterBuilder, cuda._launch
    edges = np.zeros(
        (0, 2), dtype=np.int64
    )  # for each tensor of the launch: its first address, and the one after its last

    def launched(kernel: Any, arguments: tuple[Any, ...], options: dict[str, int]) -> None:
        nonlocal edges
        tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
        edges = np.array(sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors))
        launch(kernel, arguments, options)

    def look_at(pointers: Any, mask: Any) -> None:
        # The mask of a load or store has one value, or one for each address; None means all addresses.
        address = np.asarray(pointers.data).astype(np.int64)
        if mask is not None:
            address, is_used = np.broadcast_arrays(address, np.asarray(mask.data).astype(bool))
            address = address[is_used]
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        tensor = np.searchsorted(edges[:, 0], address, side="right") - 1
        outside = (tensor < 0) | (address + size > edges[tensor, 1])
        if outside.any():
            raise IndexError(f"{int(outside.sum())} of {address.size} addresses are outside the tensors of the kernel")

    load, store = builder.create_masked_load, builder.create_masked_store

    def guarded_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        look_at(pointers, mask)
        return load(self, pointers, mask, *others)

    def guarded_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        look_at(pointers, mask)
        return store(self, pointers, value, mask, *others)

    cuda._launch, builder.create_masked_load, builder.create_masked_store = launched, guarded_load, guarded_store
