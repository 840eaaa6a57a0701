# SPDX-License-Identifier: Apache-2.0
"""What the package promises by name exists, and costs nothing before it is used."""

from __future__ import annotations

import subprocess
import sys

import talkingdit


def test_every_name_exists() -> None:
    for name in talkingdit.__all__:
        assert getattr(talkingdit, name) is not None, name
    everything: dict[str, object] = {}
    exec("from talkingdit import *", everything)
    assert set(talkingdit.__all__) <= set(everything)
    assert set(dir(talkingdit)) == set(talkingdit.__all__)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, talkingdit; assert not {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
