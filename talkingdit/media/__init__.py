# SPDX-License-Identifier: Apache-2.0
"""Videos, sound and images: reading, writing, framing, colour, the preview sheet."""
