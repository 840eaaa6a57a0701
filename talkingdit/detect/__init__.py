# SPDX-License-Identifier: Apache-2.0
"""What looks at pictures and sound and finds things in them. Weights come inside packages; nothing is downloaded."""
