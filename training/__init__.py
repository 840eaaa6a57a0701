# SPDX-License-Identifier: Apache-2.0
"""Training, run from the repository: `python -m training.train`."""

from talkingdit.openmp import wait_briefly

wait_briefly()  # before any module imports torch
