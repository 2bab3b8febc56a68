#!/usr/bin/env bash
# Checks distplb on all GPUs of this host (two or more): collectives, plans against the CPU's, a move with AdamW state.
# Writes benchmarks/results/DATE-nccl-Ngpu.md and .json; exits with 1 if a check fails. Options are passed to the check:
#   launch/nccl.sh
#   CUDA_VISIBLE_DEVICES=0,1 launch/nccl.sh --dim 4096 --repeats 100
set -euo pipefail
. "$(dirname "$0")/environment.sh" ""
gpus=$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" -lt 2 ]; then
    echo "the checks need 2 GPUs or more, and torch sees $gpus; run this on a host with more GPUs" >&2
    exit 2
fi
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$gpus" -m benchmarks.comm.check_nccl "$@"
