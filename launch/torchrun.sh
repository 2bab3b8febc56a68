#!/usr/bin/env bash
# Runs your script with one process per GPU of this host, or per core if it has no GPU:
#   launch/torchrun.sh train.py --steps 100
#   NPROC_PER_NODE=2 launch/torchrun.sh examples/pretrain_moe.py --compare
# On several hosts, start the same command on each; MASTER_ADDR is the first host:
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh train.py    # NODE_RANK 0 to 3, in the order of the hosts
# MAX_RESTARTS=3 restarts all processes, up to three times, when one fails; the script must resume from its checkpoint.
# Without NODE_RANK, hosts are numbered in the order they join. MASTER_PORT defaults to 29500.
set -euo pipefail
script=$(realpath "${1:?a script to run; launch/torchrun.sh train.py --steps 100}")
shift
. "$(dirname "$0")/environment.sh" ""
PYTHON=$(realpath --no-symlinks "$(command -v "$PYTHON")")
cd "$OLDPWD" # the script's paths are relative to the caller's folder
nodes=(--standalone)
if [ "${NNODES:-1}" != 1 ]; then
    master=${MASTER_ADDR:?the first host; the same on all hosts} port=${MASTER_PORT:-29500}
    if [ -n "${NODE_RANK:-}" ]; then
        nodes=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$master" --master-port "$port")
    else
        nodes=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$master:$port" --rdzv-id "${JOB_ID:-distplb}")
    fi
fi
# Otherwise torch 2.13 restarts processes with the old store, in which gloo finds the addresses of the dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
each=(--nproc-per-node "${NPROC_PER_NODE:-auto}" --max-restarts "${MAX_RESTARTS:-0}")
exec "$PYTHON" -m torch.distributed.run "${nodes[@]}" "${each[@]}" "$script" "$@"
