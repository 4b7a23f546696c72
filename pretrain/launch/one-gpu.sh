#!/bin/bash
# One GPU of this machine, the first or number $GPU:
#
#   pretrain/launch/one-gpu.sh RECIPE [--key value …]
#
# What a signal stops (exit code 75) the same command continues.
set -euo pipefail
export CUDA_VISIBLE_DEVICES="${GPU:-0}"
exec forethought fit "$@" --devices 1 --nodes 1
