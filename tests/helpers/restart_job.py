"""The job of `checkpoint_job` for torchrun: a rank is killed in the first run, and the second run resumes.

    torchrun --standalone --nproc-per-node 2 --max-restarts 1 tests/helpers/restart_job.py FOLDER "moving 12"

Each rank of the second run writes the result of `checkpoint_job.run` to FOLDER/rank<number>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoint_job import run

if __name__ == "__main__":
    folder, killed = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    found = run(1, folder, moves=True, resume=restarts > 0, killed="" if restarts else killed)
    if restarts:
        Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
