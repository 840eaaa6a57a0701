# SPDX-License-Identifier: Apache-2.0
"""`python -m training.train --config training/configs/puppets.toml [--optim.lr 1e-3 ...]`, alone or under torchrun.

    torchrun --nproc-per-node 8 -m training.train --config training/configs/wan_s2v.toml

The same command goes on with a run that was stopped, on any number of processes. docs/launch.md has more.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from talkingdit.errors import UserError
from training import parallel
from training.config import parse
from training.family import family_of
from training.loop import Trainer
from training.one_run import one_run
from training.signals import Stop, run_guarded
from training.stages import check_supported


def train() -> None:
    """A run from its command line to its end.

    Raises:
        UserError: something that the user can correct.
    """
    with ExitStack() as run:
        _train(run)
    parallel.stop()


def _train(run: ExitStack) -> None:
    try:
        config = parse()
        family = family_of(config)
        for stage in config.stages:
            check_supported(stage, family)
        if config.run.device == "cpu" or not torch.cuda.is_available():
            torch.set_num_threads(config.run.threads)
        mesh = parallel.start(config.parallel, config.run.device)
        run.enter_context(one_run(config.run.out, "training"))
        trainer = Trainer(config, mesh)
    except ValueError as error:  # of a configuration that makes no sense; later ones are faults, with their traceback
        raise UserError(f"{error}") from error
    with Stop(config.parallel.timeout_seconds) as stop:
        trainer.run(stop)


@record
def main() -> int:
    return run_guarded(train)


if __name__ == "__main__":
    sys.exit(main())
