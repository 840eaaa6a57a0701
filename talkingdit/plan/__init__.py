# SPDX-License-Identifier: Apache-2.0
"""What a video or a training run will need in memory and time, counted before anything is loaded."""
