#!/usr/bin/env bash
# Runs your script on MPI ranks, which plan together through distplb.comm.mpi.MpiComm:
#   launch/mpirun.sh plan.py load.npy                                      # 2 ranks on this host
#   MPIEXEC="mpiexec -n 64 -hostfile hosts" launch/mpirun.sh plan.py       # any launcher of your MPI, with its options
#   MPIEXEC="srun --ntasks=64 --mpi=pmi2" launch/mpirun.sh plan.py
# An error on one rank ends all ranks. Uses the cluster's MPI; if there is none: pip install mpich
set -euo pipefail
script=$(realpath "${1:?a script to run; launch/mpirun.sh plan.py}")
shift
. "$(dirname "$0")/environment.sh" mpi
PYTHON=$(realpath --no-symlinks "$(command -v "$PYTHON")")
cd "$OLDPWD" # the script's paths are relative to the caller's folder
PATH="$(dirname "$PYTHON"):$PATH" # the mpich wheel installs mpiexec here
read -r -a mpiexec <<< "${MPIEXEC:-mpiexec -n 2}"
if ! command -v "${mpiexec[0]}" > /dev/null; then
    echo "${mpiexec[0]} is not installed; load your cluster's MPI, or pip install mpich" >&2
    exit 2
fi
# mpi4py's runner aborts all ranks when one raises; otherwise the others would wait for it in MPI_Finalize.
exec "${mpiexec[@]}" "$PYTHON" -m mpi4py "$script" "$@"
