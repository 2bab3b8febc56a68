#!/usr/bin/env bash
# Trains a small mixture-of-experts model, static and rebalanced in turns, on two processes of one thread each; prints
# what rebalancing gains, and writes an HTML report of each rebalanced run to quickstart/.
# Arguments are passed to examples/pretrain_moe.py: launch/quickstart.sh --json result.json
set -euo pipefail
. "$(dirname "$0")/environment.sh" report
export OMP_NUM_THREADS=1
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 examples/pretrain_moe.py --compare \
    --report quickstart "$@"
