# SPDX-License-Identifier: Apache-2.0
"""From a job to its video: what the command line and programs have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit.families import Family, GenerationOptions
from talkingdit.pipelines.inputs import Inputs, Job, Outline, check_enlarged, check_heard, read_inputs

if TYPE_CHECKING:
    from talkingdit.distributed.layout import Parallel
    from talkingdit.pipelines.job import Result, Talk


def outlined(family: Family, folder: Path, job: Job, options: GenerationOptions) -> tuple[Inputs, Outline]:
    """What is read for a job and what video it gives, without any model.

    Args:
        family: of the checkpoint.
        folder: of the checkpoint.
        job: what is asked for.
        options: of the family.

    Raises:
        UserError: a file or an option is not good.
    """
    inputs = read_inputs(job, options.files())
    outline = family.outline.outline(inputs, family.checkpoint.read_settings(folder), options)
    check_heard(job, outline)
    check_enlarged(job, outline)
    return inputs, outline


def made(
    family: Family,
    checkpoint: Any,
    inputs: Inputs,
    outline: Outline,
    *,
    talk: Talk,
    variant: str,
    parallel: Parallel | None = None,
) -> Result:
    """The video of a job, written where the job says. See `talkingdit.pipelines.job.make_video`."""
    from talkingdit.pipelines.job import make_video

    pipeline = family.pipeline.open_pipeline(checkpoint, parallel)
    curves = None if family.preview is None else family.preview.Curves()
    return make_video(inputs, outline, pipeline, curves=curves, talk=talk, variant=variant)
