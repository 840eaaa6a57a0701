# SPDX-License-Identifier: Apache-2.0
"""The harness of the multi-process tests: what a rank does wrong must fail the test, and quickly."""

from __future__ import annotations

import ctypes
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
from distributed import JobFailed, Processes
from forked import PRELOADED, run
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from talkingdit.distributed.team import from_all_ranks


def add_ranks(start: Tensor) -> tuple[int, Tensor]:
    x = start + dist.get_rank()
    dist.all_reduce(x)
    return os.getpid(), x


def mesh_sums() -> list[float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    sums = []
    for name in ("a", "b"):
        x = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(x, group=mesh[name].get_group())
        sums.append(x.item())
    return sums


def ranks_of_all_and_of_a_group() -> tuple[list[dict[str, int]], list[int]]:
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    return from_all_ranks({"rank": dist.get_rank()}), from_all_ranks(dist.get_rank(), pairs["b"].get_group())


def wrong_in_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("no such thing")
    dist.barrier()


def late_in_rank_1() -> None:
    if dist.get_rank() == 1:
        where_it_hangs()
    dist.barrier()


def where_it_hangs() -> None:
    time.sleep(1000)


def dies_in_rank_0() -> None:
    if dist.get_rank() == 0:
        ctypes.string_at(0)
    dist.barrier()


def what_is_not_imported() -> int:
    return sum(name not in sys.modules for name in PRELOADED)


def test_processes_begin_with_all_imports_done() -> None:
    assert len(PRELOADED) > 1
    assert run(what_is_not_imported) == 0


def test_every_rank_runs_the_job_in_one_group(processes: Processes) -> None:
    results = processes(3, add_ranks, torch.tensor([1.0, 10.0]))
    assert len({pid for pid, _ in results} | {os.getpid()}) == 4
    for _, total in results:
        torch.testing.assert_close(total, torch.tensor([6.0, 33.0]))


def test_workers_serve_jobs_of_any_size_again(processes: Processes) -> None:
    first = {pid for pid, _ in processes(2, add_ranks, torch.zeros(1))}
    assert processes(4, mesh_sums) == [[2.0, 1.0], [4.0, 1.0], [2.0, 5.0], [4.0, 5.0]]
    assert {pid for pid, _ in processes(2, add_ranks, torch.zeros(1))} == first


def test_every_rank_gets_what_all_have(processes: Processes) -> None:
    everyone = [{"rank": rank} for rank in range(4)]
    found = processes(4, ranks_of_all_and_of_a_group)
    assert found == [(everyone, [0, 1]), (everyone, [0, 1]), (everyone, [2, 3]), (everyone, [2, 3])]
    assert from_all_ranks("alone") == ["alone"]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (wrong_in_rank_1, r"rank 1 of 2: Traceback[\s\S]*in wrong_in_rank_1[\s\S]*KeyError: 'no such thing'"),
        (dies_in_rank_0, r"rank 0 of 2: the process died with exit code -11[\s\S]*in dies_in_rank_0"),
    ],
)
def test_a_failing_rank_fails_the_job_with_its_traceback(processes: Processes, job, message) -> None:
    with pytest.raises(JobFailed, match=message):
        processes(2, job)


def test_a_hang_ends_with_the_place_where_it_hangs(processes: Processes) -> None:
    processes(2, add_ranks, torch.zeros(1))  # what there is to import is imported now
    with pytest.raises(JobFailed, match=r"rank 1 of 2 was still running after 1 s:[\s\S]*in where_it_hangs"):
        processes(2, late_in_rank_1, timeout=1)
    assert processes(2, add_ranks, torch.zeros(1))[0][1] == 1  # new workers


def test_more_processes_than_there_are(processes: Processes) -> None:
    with pytest.raises(ValueError, match="processes: size must be from 1 to 4, got 5"):
        processes(5, add_ranks)
