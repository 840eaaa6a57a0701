# SPDX-License-Identifier: Apache-2.0
"""`training.train` that knows the toy family, for torchrun; SIGKILL ends it while it saves the step in TOY_KILL."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import training.train
from talkingdit import families
from training.checkpoint_files import CheckpointWriter

if __name__ == "__main__":
    families.register("toy", "toy_family")
    finish = CheckpointWriter.finish

    def finish_or_die(self: CheckpointWriter, *arguments: Any, **more: Any) -> None:
        if os.environ.get("TOY_KILL") and self.final.name.endswith(os.environ["TOY_KILL"]):
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, *arguments, **more)

    CheckpointWriter.finish = finish_or_die  # type: ignore[method-assign]
    sys.exit(training.train.main())
