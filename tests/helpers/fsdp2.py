"""Whether FSDP2 runs here: that of torch 2.6 uses methods of streams that CPU streams do not have yet."""

from __future__ import annotations

import pytest
import torch

__all__ = ["RUNS", "needs_fsdp2"]

RUNS = hasattr(torch.cpu.Stream, "record_event")
needs_fsdp2 = pytest.mark.skipif(not RUNS, reason="this torch's FSDP2 does not run on a CPU")
