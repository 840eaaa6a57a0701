# SPDX-License-Identifier: Apache-2.0
"""Memory of large results on the CPU: tensors like any other, in pages that an earlier one has left."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

import pytest
import torch

from talkingdit.ops._memory import _CODES, empty

LARGE = (1 << 20, 3)  # at least 6 MB in every dtype that has a code and more than a byte
like = torch.empty(0)


@pytest.mark.parametrize("dtype", [*_CODES, torch.float8_e4m3fn, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (7,), (5 << 20,), (2, 3, 1 << 20)])
def test_results_are_what_torch_makes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    made = empty(shape, like, dtype)
    assert (made.shape, made.dtype, made.device.type) == (torch.Size(shape), dtype, "cpu")
    assert made.is_contiguous()
    assert not made.requires_grad
    assert made._base is None
    if dtype.is_floating_point and dtype.itemsize > 1:
        made.fill_(1.5)
        assert made.double().sum() == 1.5 * made.numel()


def test_pages_of_a_dropped_result_are_given_out_again_and_no_others() -> None:
    first = empty(LARGE, like).fill_(1)
    second = empty(LARGE, like).fill_(2)
    assert first.data_ptr() != second.data_ptr()
    view, place = first[5:], first.data_ptr()
    del first
    third = empty(LARGE, like).fill_(3)
    assert place not in (second.data_ptr(), third.data_ptr())
    assert (view == 1).all()  # a view keeps them
    assert (second == 2).all()
    del view
    assert empty(LARGE, like).data_ptr() == place
    assert empty((LARGE[0], 4), like).data_ptr() != place  # too small for it
    assert empty((LARGE[0], 2), like).data_ptr() != place  # more than a fifth would lie idle


def test_no_more_is_kept_than_a_32nd_of_the_machine() -> None:
    """What a program needed once does not stay: the blocks that were dropped last do, as far as there is room."""
    room = os.sysconf("SC_PHYS_PAGES") // 32 * os.sysconf("SC_PAGESIZE")
    shape = (-(-room // 5 // 4096), 4096 // like.element_size())
    results = [empty(shape, like) for _ in range(10)]
    places = [one.data_ptr() for one in results]
    while results:
        del results[0]
    maps = Path("/proc/self/maps").read_text()
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps.splitlines()]
    kept = [place for place in places if any(low <= place < high for low, high in ranges)]
    assert kept == places[-4:]  # a fifth would be a page too much


def test_results_are_made_and_dropped_in_many_threads() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for step in range(30):
            made = empty(LARGE, like).fill_(100 * number + step)
            if not (made[::4096] == 100 * number + step).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _child() -> None:
    part = empty(LARGE, like)[:10].fill_(2)  # small: torch's threads do not survive a fork
    assert (part == 2).all()


def test_a_forked_process_has_results_of_its_own() -> None:
    kept = empty(LARGE, like).fill_(1)
    del kept
    kept = empty(LARGE, like).fill_(1)
    child = multiprocessing.get_context("fork").Process(target=_child, daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert (kept == 1).all()
