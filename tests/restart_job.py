"""For torchrun: the job of `checkpoint_job`, in which a rank is killed in its first life; the second one resumes,
as one stage of EP 4 where there were two of EP 2.

    torchrun --standalone --nproc-per-node 4 --max-restarts 1 tests/restart_job.py FOLDER "moving 12"

Each rank of the second life writes what `checkpoint_job.run` gives as FOLDER/rank<number>.json.
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
    stages, killed = (1, "") if restarts else (2, killed)
    found = run(stages, folder, moves=True, resume=restarts > 0, killed=killed)
    if restarts:
        Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
