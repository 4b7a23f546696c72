#!/bin/bash
# All GPUs of this machine:
#
#   pretrain/launch/torchrun.sh RECIPE [--key value …]
#
# or of several, by the same command on each; the run directory lies where all of them see it:
#
#   NODES=4 HEAD=host0:29500 pretrain/launch/torchrun.sh RECIPE [--key value …]
#
# PROCESSES: of each machine; by default one for each GPU.
# RESTARTS: how often all processes are started again, from the newest checkpoint, after one of them has died.
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
if [[ ${NODES:-1} == 1 ]]; then
    where=(--standalone)
else
    where=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "${HEAD:?is the first machine, host:port}")
fi
exec torchrun "${where[@]}" --nproc-per-node "${PROCESSES:-gpu}" --max-restarts "${RESTARTS:-3}" -m pretrain fit "$@"
