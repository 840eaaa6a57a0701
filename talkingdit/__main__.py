# SPDX-License-Identifier: Apache-2.0
"""`python -m talkingdit` is the command `talkingdit`; torchrun starts it so."""

import sys

from talkingdit.cli.main import main

sys.exit(main())
