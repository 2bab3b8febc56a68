#!/usr/bin/env bash
# Runs a script of yours with one process for each GPU of this host (or each core, where there is no GPU):
#   launch/torchrun.sh train.py --steps 100
#   NPROC_PER_NODE=2 launch/torchrun.sh examples/pretrain_moe.py --compare
# On several hosts, start the same on each of them; the first is named by MASTER_ADDR:
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh train.py    # NODE_RANK 0 to 3, in the order of the hosts
# MAX_RESTARTS=3 starts all processes anew where one fails; a script that resumes from its checkpoint then goes on.
# Without NODE_RANK hosts are numbered as they come. MASTER_PORT is 29500 if it is not set.
set -euo pipefail
script=$(realpath "${1:?a script to run; launch/torchrun.sh train.py --steps 100}")
shift
. "$(dirname "$0")/environment.sh" ""
PYTHON=$(realpath --no-symlinks "$(command -v "$PYTHON")")
cd "$OLDPWD" # where the script's own paths are meant
nodes=(--standalone)
if [ "${NNODES:-1}" != 1 ]; then
    master=${MASTER_ADDR:?the first host; the same on all hosts} port=${MASTER_PORT:-29500}
    if [ -n "${NODE_RANK:-}" ]; then
        nodes=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$master" --master-port "$port")
    else
        nodes=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$master:$port" --rdzv-id "${JOB_ID:-distplb}")
    fi
fi
# Otherwise torch 2.13 starts them anew with the old store, in which gloo finds the addresses of those that are gone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
each=(--nproc-per-node "${NPROC_PER_NODE:-auto}" --max-restarts "${MAX_RESTARTS:-0}")
exec "$PYTHON" -m torch.distributed.run "${nodes[@]}" "${each[@]}" "$script" "$@"
