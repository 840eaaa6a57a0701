#!/usr/bin/env bash
# Ground: deep (torch's DTensor: which rules it has for the gradients of losses).
# Versions: torch 2.13.0 (CPU), Python 3.10 or newer; no GPU needed.
#
# `F.mse_loss`, the loss of every diffusion trainer, of two DTensors that are sharded over their batch or their tokens
# has the right value and the wrong gradient: as many times too large as there are ranks. huber_loss, smooth_l1_loss,
# soft_margin_loss and binary_cross_entropy are like it; the mean of squares written out, l1_loss, and mse_loss with
# reduction "sum" or "none" are right. Loss curves show nothing, and Adam hides a common factor; what suffers is the
# norm by which gradients are clipped, SGD, and a sum of losses, of which this one weighs more with every rank. Where
# rows do not divide evenly the value is wrong as well, a mean of the ranks' means, and NaN if a rank has no rows; the
# mean of squares stays right then, too.
#
# What to do: (prediction - target).square().mean(), or take the loss of local tensors.
#
# Seen, gradients of a weight by those without sharding, and the loss of 5 rows whose squares have the mean 11:
#     2 ranks: mse_loss 2, huber_loss 2, binary_cross_entropy 2, squares 1, l1_loss 1, all values right
#     2 ranks, 5 rows: mse_loss 12.58, squares 11.00
#     4 ranks: mse_loss 4, huber_loss 4, binary_cross_entropy 4, squares 1, l1_loss 1, all values right
#     4 ranks, 5 rows: mse_loss nan, squares 11.00
# The script fails where this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat >"$folder/look.py" <<'PYTHON'
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def squares(a, b):
    return (a - b).square().mean()


def binary_cross_entropy(a, b):
    return F.binary_cross_entropy(a.sigmoid(), b.sigmoid())


dist.init_process_group("gloo")
ranks = dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,))
torch.manual_seed(0)
rows, target, weight = torch.randn(12, 4), torch.randn(12, 5), torch.randn(4, 5)
seen, right = [], True
for loss_of in (F.mse_loss, F.huber_loss, binary_cross_entropy, squares, F.l1_loss):
    whole = weight.clone().requires_grad_()
    loss = loss_of(rows @ whole, target)
    loss.backward()
    sharded = distribute_tensor(weight, mesh, [Replicate()]).requires_grad_()
    a, b = (distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (rows, target))
    found = loss_of(a @ sharded, b)
    found.backward()
    right &= torch.allclose(found.full_tensor(), loss)
    factor = sharded.grad.full_tensor() / whole.grad
    assert torch.allclose(factor, factor.mean(), rtol=1e-3), loss_of
    seen.append(f"{loss_of.__name__} {factor.mean():.0f}")
few = distribute_tensor(torch.arange(1.0, 6.0)[:, None], mesh, [Shard(0)])
uneven = [f"{of.__name__} {of(few, torch.zeros_like(few)).full_tensor():.2f}" for of in (F.mse_loss, squares)]
if dist.get_rank() == 0:
    print(f"{ranks} ranks: {', '.join(seen)}, all values {'right' if right else 'wrong'}")
    print(f"{ranks} ranks, 5 rows: {', '.join(uneven)}")
dist.barrier()
dist.destroy_process_group()
PYTHON
for ranks in 2 4; do
    OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node $ranks \
        "$folder/look.py" 2>>"$folder/errors"
done | tee "$folder/seen"
sed -n '/^# Seen,/,/^# The script/s/^#     //p' "$0" | diff - "$folder/seen"
