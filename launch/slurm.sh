#!/usr/bin/env bash
#SBATCH --job-name=distplb
#SBATCH --ntasks-per-node=1
# Runs your script on all nodes of a Slurm job: one torchrun per node, with one process per GPU.
# Submit it from the folder of this repository, which must be on a file system that all nodes share, .venv included:
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 launch/slurm.sh train.py --steps 100
# NPROC_PER_NODE overrides the number of processes per node. Other options of sbatch go before launch/slurm.sh.
set -euo pipefail
script=$(realpath "${1:?a script to run; sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh train.py}")
shift
# Slurm runs a copy of this file from its own folder, so the path of this repository is taken from sbatch.
. "${SLURM_SUBMIT_DIR:?not set; start this script with sbatch}/launch/environment.sh" ""
PYTHON=$(realpath --no-symlinks "$(command -v "$PYTHON")")
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 20000)) # another job may share the node
job=(--nnodes "${#hosts[@]}" --nproc-per-node "${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-auto}}")
job+=(--master-addr "${hosts[0]}" --master-port "$port")
# Since Slurm 22.05 srun does not inherit this from sbatch, and all processes of a node would share one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
# Nodes are numbered in Slurm's order, which follows the network topology if Slurm knows it.
# shellcheck disable=SC2016 # expanded by the shell of each task
exec srun --nodes "${#hosts[@]}" --ntasks "${#hosts[@]}" --ntasks-per-node 1 --kill-on-bad-exit=1 bash -c \
    'exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"' "$PYTHON" "${job[@]}" "$script" "$@"
