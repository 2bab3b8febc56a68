"""Names of torch after 2.6 for asynchronous saves that copy first; tests that need them skip on older torch."""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["AsyncSaveResponse", "DefaultStager", "StagingOptions", "needs_stagers"]

AsyncSaveResponse: Any
DefaultStager: Any
StagingOptions: Any
try:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
except ImportError:
    AsyncSaveResponse = DefaultStager = StagingOptions = object

needs_stagers = pytest.mark.skipif(DefaultStager is object, reason="torch 2.6 has no stager that copies in a thread")
