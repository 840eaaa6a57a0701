# SPDX-License-Identifier: Apache-2.0
"""Which of two systems a judge prefers: the win rate of JWB-DH-V1 (section 3.4).

W = (wins + ties / 2) / n. Which of the two is shown first is drawn for each comparison, so that a judge that prefers
the first one gives 50 %.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from talkingdit.atomic import write_whole
from talkingdit.errors import UserError
from talkingdit.eval.statistics import interval
from talkingdit.media.checks import digest_of

Judge = Callable[[Path, Path, str], int]  # (first, second, text) -> 1 or 2, 0 for a tie


@dataclass(frozen=True)
class WinRate:
    """W of a system against another, with its 95 % interval, and every verdict: 1 won, 0 lost, 0.5 tied."""

    rate: float
    low: float
    high: float
    verdicts: tuple[float, ...]


def win_rate(contests: Sequence[tuple[Path, Path, str]], judge: Judge, seed: int = 0) -> WinRate:
    """Win rate of the first of each contest against the second.

    Args:
        contests: (file of the system, file of the baseline, text).
        judge: is given the two in a random order.
        seed: of the order.

    Raises:
        ValueError: no contests.
        UserError: the judge says something else than 0, 1 or 2.
    """
    if not contests:
        raise ValueError("win_rate: contests must not be empty")
    swapped = np.random.default_rng(seed).random(len(contests)) < 0.5
    verdicts = []
    for (system, baseline, text), swap in zip(contests, swapped, strict=True):
        first, second = (baseline, system) if swap else (system, baseline)
        winner = judge(first, second, text)
        if winner not in (0, 1, 2):
            raise UserError(f"eval: the judge must say 1, 2, or 0 for a tie, got {winner!r} for {first} and {second}.")
        verdicts.append(0.5 if winner == 0 else float(winner == (2 if swap else 1)))
    around = interval(verdicts, seed)
    return WinRate(around.mean, around.low, around.high, tuple(verdicts))


def remembering(judge: Judge, name: str, folder: Path) -> Judge:
    """A judge whose verdicts are kept in a folder, so that none is asked for twice: one may cost money, or a person.

    Args:
        judge: that is asked.
        name: whose verdicts they are; another name is another judge.
        folder: that is there. A verdict holds for the bytes of both videos in their order, and for the text.
    """

    def remembered(first: Path, second: Path, text: str) -> int:
        told = json.dumps([name, digest_of(first), digest_of(second), text])
        file = folder / f"verdict-{hashlib.sha256(told.encode()).hexdigest()[:32]}.txt"
        if file.is_file() and (known := file.read_text().strip()) in ("0", "1", "2"):
            return int(known)
        winner = judge(first, second, text)
        if winner in (0, 1, 2):
            write_whole(file, f"{winner}\n".encode())
        return winner

    return remembered


def command_judge(command: str, seconds: float = 600) -> Judge:
    """A judge that is a program: `command FIRST SECOND TEXT` prints 1, 2 or 0 as its last word.

    Raises:
        UserError: the program is not there; of the judge: it fails, takes too long, or prints something else.
    """
    try:
        program = shlex.split(command)
    except ValueError as error:
        raise UserError(f"eval: --judge {command!r}: expected words of a command ({error}).") from None
    if not program or shutil.which(program[0]) is None:
        raise UserError(f"eval: --judge {command!r}: there is no such program.")

    def judge(first: Path, second: Path, text: str) -> int:
        words = [*program, str(first), str(second), text]
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=seconds, check=True)
        except OSError as error:
            raise UserError(f"eval: --judge {command!r} cannot be run ({error.strerror}).") from None
        except subprocess.TimeoutExpired:
            raise UserError(f"eval: --judge {command!r} took more than {seconds:g} s for {first.name}.") from None
        except subprocess.CalledProcessError as error:
            told = (error.stderr or "").strip().splitlines()
            raise UserError(
                f"eval: --judge {command!r} failed for {first.name}: {told[-1] if told else error}"
            ) from None
        last = done.stdout.split()[-1:] or [""]
        if last[0] not in ("0", "1", "2"):
            raise UserError(f"eval: --judge {command!r} must print 1, 2 or 0, got {done.stdout.strip()[-60:]!r}.")
        return int(last[0])

    return judge
