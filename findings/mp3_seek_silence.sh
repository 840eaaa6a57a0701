#!/usr/bin/env bash
# Ground: deep (libmpg123 in the wheel of soundfile, and the bits that frames of an MP3 borrow from earlier frames).
# Versions: soundfile 0.14.0 (its wheel, libsndfile 1.2.2), Python 3.10 or newer.
#
# A part of an MP3, `soundfile.read(file, start=..., frames=...)`, may begin with silence, then noise, where the file
# has sound: seen are up to 0.4 s, at the right place and of the right length, without an exception. The whole file is
# read right (PyAV gives the same samples, also of parts). After a seek the decoder lacks the bits that frames borrow
# from frames before them, and is silent until it has enough; a steady sound, whose frames are small, always shows it.
# Speech does too: of two minutes of it, written with soundfile's defaults at 16, 24, 44.1 and 48 kHz, 7, 17, 24 and
# 36 percent of all parts began wrong, by up to 0.28 s; with compression_level=0.7 20, 38, 74 and 82 percent. Clips that
# a data set cuts from MP3s begin with a silence that nobody recorded, and mouths move in it. librosa.load (0.11.0)
# with an offset reads by soundfile and gives the same.
#
# What to do: begin a second earlier and throw that away, or decode MP3s whole, or with PyAV.
#
# Seen, a tone of 220 Hz whose root mean square is 0.35, from 2 s on, in tenths of a second:
#     whole file, cut: 0.35 0.35 0.35 0.35
#     a part: 0.00 0.00 0.02 0.32, of the right length
#     a part begun a second earlier, cut: 0.35 0.35 0.35 0.35, the same samples as of the whole file
#     a part of a FLAC: 0.35 0.35 0.35 0.35, of the right length
# The script fails where this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check soundfile==0.14.0 numpy==2.3.5
cat >"$folder/look.py" <<'PYTHON'
import sys

import numpy as np
import soundfile

RATE, START, LENGTH = 16000, 32000, 6400
tone = 0.5 * np.sin(2 * np.pi * 220 * np.arange(10 * RATE) / RATE)


def levels(samples):
    return " ".join(f"{np.sqrt(np.mean(tenth**2)):.2f}" for tenth in samples[:LENGTH].reshape(4, -1))


def part(file, start, length):
    return soundfile.read(file, start=start, frames=length)[0]


def fits(samples):
    return "of the right length" if len(samples) == LENGTH else "of another length"


mp3, flac = f"{sys.argv[1]}/tone.mp3", f"{sys.argv[1]}/tone.flac"
soundfile.write(mp3, tone, RATE)
soundfile.write(flac, tone, RATE)
whole = soundfile.read(mp3)[0][START : START + LENGTH]
found = part(mp3, START, LENGTH)
earlier = part(mp3, START - RATE, RATE + LENGTH)[RATE:]
lossless = part(flac, START, LENGTH)
print("whole file, cut:", levels(whole))
print(f"a part: {levels(found)}, {fits(found)}")
same = "the same samples as" if np.abs(earlier - whole).max() < 1e-5 else "other samples than"
print(f"a part begun a second earlier, cut: {levels(earlier)}, {same} of the whole file")
print(f"a part of a FLAC: {levels(lossless)}, {fits(lossless)}")
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2>"$folder/errors" | tee "$folder/seen"
sed -n '/^# Seen,/,/^# The script/s/^#     //p' "$0" | diff - "$folder/seen"
