# SPDX-License-Identifier: Apache-2.0
"""From a pile of videos to clean clips of people who speak: measured once, decided as often as one likes.

`measure.py` watches a video and notes figures, `decide.py` holds them against thresholds, `write.py` writes what
training reads. `local.py` and `on_ray.py` run the first over many videos; `job.py` is the whole of it.
"""
