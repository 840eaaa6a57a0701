# SPDX-License-Identifier: Apache-2.0
"""What turns words and sound into features: UMT5, wav2vec 2.0, log-mel."""
