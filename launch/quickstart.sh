#!/usr/bin/env bash
# Trains a small mixture-of-experts model on two processes of one thread each, static and rebalanced side by side,
# prints what the rebalancing gained, and writes a report of each rebalanced run to look at: quickstart/*.html.
# Arguments are handed on: launch/quickstart.sh --json result.json
set -euo pipefail
. "$(dirname "$0")/environment.sh" report
export OMP_NUM_THREADS=1
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 examples/pretrain_moe.py --compare \
    --report quickstart "$@"
