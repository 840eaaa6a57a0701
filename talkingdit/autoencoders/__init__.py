# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of Wan: loading it, decoding long videos as a stream, and sharing a frame's rows among processes."""
