# SPDX-License-Identifier: Apache-2.0
"""What files are by their names, where that has to be known before they are opened."""

from __future__ import annotations

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif")
VIDEOS = (
    *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".ts", ".mts"),
    *(".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ogv"),
)
