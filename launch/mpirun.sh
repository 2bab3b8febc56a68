#!/usr/bin/env bash
# Runs a script of yours on ranks of MPI, which plan together by distplb.comm.mpi.MpiComm:
#   launch/mpirun.sh plan.py load.npy                                      # 2 ranks on this host
#   MPIEXEC="mpiexec -n 64 -hostfile hosts" launch/mpirun.sh plan.py       # any launcher of your MPI, with its options
#   MPIEXEC="srun --ntasks=64 --mpi=pmi2" launch/mpirun.sh plan.py
# An error on one rank ends all of them. The MPI is the cluster's; where there is none: pip install mpich
set -euo pipefail
script=$(realpath "${1:?a script to run; launch/mpirun.sh plan.py}")
shift
. "$(dirname "$0")/environment.sh" mpi
PYTHON=$(realpath --no-symlinks "$(command -v "$PYTHON")")
cd "$OLDPWD" # where the script's own paths are meant
PATH="$(dirname "$PYTHON"):$PATH" # where the wheel of mpich puts it
read -r -a mpiexec <<< "${MPIEXEC:-mpiexec -n 2}"
if ! command -v "${mpiexec[0]}" > /dev/null; then
    echo "no ${mpiexec[0]} here; load your cluster's MPI, or pip install mpich" >&2
    exit 2
fi
# mpi4py's own runner aborts all ranks when one raises, instead of waiting for it in MPI_Finalize.
exec "${mpiexec[@]}" "$PYTHON" -m mpi4py "$script" "$@"
