"""Engine `cuda`'s kernels in Triton's interpreter, in a child, where each address that they use is checked.

A kernel that writes outside of its tensors may give right results in an interpreter, and another job's memory on a GPU.
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
    """What a function of a test module prints last, as JSON, in a child in which Triton interprets.

    Triton must not have been imported before, so that it cannot be this process.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    if not hasattr(interpreter.InterpreterBuilder, "get_int1_ty"):  # as those of Triton 3.2, of torch 2.6, and 3.3
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
    """In the child, or a rank of it: the interpreter patches Triton once, and looks at each address."""
    torch.set_num_threads(1)
    interpreter = importlib.import_module("triton.runtime.interpreter")
    _patch_once(interpreter)
    _guard(interpreter)


def _patch_once(interpreter: Any) -> None:
    """Keep it from patching Triton's language at each call inside a kernel: two thirds of its time."""
    from distplb.packing import cuda_kernels

    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang(cuda_kernels.greedy_kernel.fn)
        interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()


def _guard(interpreter: Any) -> None:
    """Raise where a kernel reads or writes an address that is in none of its tensors."""
    builder, launch = interpreter.InterpreterBuilder, cuda._launch
    edges = np.zeros((0, 2), dtype=np.int64)  # of the tensors of the launch: first address, and the one after the last

    def launched(kernel: Any, arguments: tuple[Any, ...], options: dict[str, int]) -> None:
        nonlocal edges
        tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
        edges = np.array(sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors))
        launch(kernel, arguments, options)

    def look_at(pointers: Any, mask: Any) -> None:
        # Loads and stores have a mask, of one value or as many as there are addresses; None is for all of them.
        address = np.asarray(pointers.data).astype(np.int64)
        if mask is not None:
            address, is_used = np.broadcast_arrays(address, np.asarray(mask.data).astype(bool))
            address = address[is_used]
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        tensor = np.searchsorted(edges[:, 0], address, side="right") - 1
        outside = (tensor < 0) | (address + size > edges[tensor, 1])
        if outside.any():
            raise IndexError(f"{int(outside.sum())} of {address.size} addresses are in no tensor of the kernel's")

    load, store = builder.create_masked_load, builder.create_masked_store

    def guarded_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        look_at(pointers, mask)
        return load(self, pointers, mask, *others)

    def guarded_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        look_at(pointers, mask)
        return store(self, pointers, value, mask, *others)

    cuda._launch, builder.create_masked_load, builder.create_masked_store = launched, guarded_load, guarded_store
