#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# torchrun on this machine, stopped gently: `training/launch/node.sh --nproc-per-node 8 -m training.train --config ...`.
#
# torchrun itself answers SIGTERM by ending its processes within 30 seconds and failing, and dies of SIGUSR1. Here both,
# and SIGINT, reach the training processes as SIGUSR1: they save and end, and the exit status is torchrun's, 0.

# Restarts fail with "Connection refused" where processes find in the store what those before them left.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
(trap '' USR1 && exec torchrun "$@") &
agent=$!
asked=
trap 'asked=yes' USR1 TERM INT
while kill -0 "$agent" 2>/dev/null; do
    if [ "$asked" ]; then
        # Again and again: a process that has just been started does not listen yet.
        pkill -USR1 -P "$agent"
        sleep 2 &
        wait $!
    else
        wait "$agent"
    fi
done
wait "$agent"
