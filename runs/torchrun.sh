#!/bin/sh
# Train with all GPUs of this host, or with PROCESSES processes; any flags of `mm-rec train`.
#
#     runs/torchrun.sh --stage all --data_dir ./data --checkpoint_dir ./checkpoints --batch_size 64
#     PROCESSES=4 runs/torchrun.sh --device cpu --preset small --batch_size 8
#
# COMMAND=pipeline or finetune runs those instead. Several hosts: the same on each, with NODES, NODE (from 0) and
# MASTER (host name of node 0, with :PORT if 29500 is taken); all must see the same data and run folders.
set -eu

python=${PYTHON:-python3}
processes=${PROCESSES:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
if [ -n "${NODES:-}" ]; then
    : "${NODE:?must be the number of this host, from 0}" "${MASTER:?must be the name of host 0}"
    hosts="--nnodes $NODES --node_rank $NODE --rdzv_backend static --master_addr ${MASTER%%:*}"
    case $MASTER in *:*) hosts="$hosts --master_port ${MASTER##*:}" ;; esac
else
    hosts=--standalone
fi
# shellcheck disable=SC2086  # $hosts are several words
exec "$python" -m torch.distributed.run $hosts --nproc_per_node "$processes" -m mm_rec.cli "${COMMAND:-train}" "$@"
