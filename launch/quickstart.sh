#!/usr/bin/env bash
# Trains a small mixture-of-experts model in turns, static, with homes that move, with replicas in every step, and with
# both, on two processes of one thread each; prints what they gain, and writes an HTML report of each run whose homes
# move to quickstart/.
# Arguments are passed to examples/pretrain_moe.py: launch/quickstart.sh --json result.json
set -euo pipefail
. "$(dirname "$0")/environment.sh" report
export OMP_NUM_THREADS=1
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 examples/pretrain_moe.py --compare \
    --report quickstart "$@"
