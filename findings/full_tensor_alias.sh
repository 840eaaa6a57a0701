#!/usr/bin/env bash
# Ground: crossed (DTensor where shards meet a world of one).
# Versions: torch 2.13.0 (CPU, gloo); Python 3.10 or newer.
#
# `DTensor.full_tensor()` gathers the shards of all processes into a tensor. On a mesh of two it is new memory. On a mesh
# of one, whether that is a world of one or the shard axis of a mesh of replicas, it is the local shard itself: what is
# done to the gradient or weight afterwards is also done to the "gathered" one. A snapshot of weights for a comparison or
# an average, or of gradients before they are clipped, so says something else on one process than on two, with no
# warning and with the same shapes.
#
# What to do: `.full_tensor().clone()` wherever the result is kept while training goes on.
#
# Seen (ones in shards, gathered, then the shards multiplied by 0 in place; the sum of what was gathered):
#     world of two: 4.0
#     world of one: 0.0
#     replicas, two of one shard each: 0.0
# The script fails where this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat >"$folder/gather.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

dist.init_process_group("gloo")
world = dist.get_world_size()
if sys.argv[1] == "replicas":
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))
    placements = [Replicate(), Shard(0)]
else:
    mesh = init_device_mesh("cpu", (world,))
    placements = [Shard(0)]
weight = distribute_tensor(torch.ones(4), mesh, placements)
gathered = weight.full_tensor()
dist.barrier()
weight.to_local().mul_(0)
if dist.get_rank() == 0:
    print(gathered.sum().item())
dist.destroy_process_group()
PYTHON
run() {
    "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node "$1" "$folder/gather.py" "$2" 2>/dev/null
}
two=$(run 2 shards)
one=$(run 1 shards)
replicas=$(run 2 replicas)
echo "world of two: $two"
echo "world of one: $one"
echo "replicas, two of one shard each: $replicas"
[ "$two" = 4.0 ] && [ "$one" = 0.0 ] && [ "$replicas" = 0.0 ]
