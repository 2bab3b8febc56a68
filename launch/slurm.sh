#!/usr/bin/env bash
#SBATCH --job-name=distplb
#SBATCH --ntasks-per-node=1
# Runs a script of yours on all nodes of a Slurm job: one torchrun on each, with one process for each GPU there.
# Submit it from the folder of this repository, which all nodes see, as they see its .venv:
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 launch/slurm.sh train.py --steps 100
# NPROC_PER_NODE sets another number of processes. Further options of sbatch go before the script.
set -euo pipefail
script=$(realpath "${1:?a script to run; sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh train.py}")
shift
# Slurm runs a copy of this file from a folder of its own.
. "${SLURM_SUBMIT_DIR:?set by sbatch, which this script is started by}/launch/environment.sh" ""
PYTHON=$(realpath --no-symlinks "$(command -v "$PYTHON")")
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 20000)) # another job may share the node
job=(--nnodes "${#hosts[@]}" --nproc-per-node "${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-auto}}")
job+=(--master-addr "${hosts[0]}" --master-port "$port")
# Since Slurm 22.05 srun does not take this over from sbatch, and all processes of a node would share one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
# Nodes are numbered in Slurm's order, which follows the network where Slurm knows it.
# shellcheck disable=SC2016 # for the shell of each task
exec srun --nodes "${#hosts[@]}" --ntasks "${#hosts[@]}" --ntasks-per-node 1 --kill-on-bad-exit=1 bash -c \
    'exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"' "$PYTHON" "${job[@]}" "$script" "$@"
