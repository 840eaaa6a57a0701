# SPDX-License-Identifier: Apache-2.0
"""`python -m training.train --config training/configs/puppets.toml [--batch.size 4 ...]`."""

from __future__ import annotations

import sys

import torch

from training.config import parse
from training.loop import Trainer
from training.puppets import precompute


def main() -> int:
    try:
        config = parse()
        torch.set_num_threads(config.run.threads)
        precompute(config.data, config.run.seed)
        Trainer(config).run()
    except ValueError as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("training: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
