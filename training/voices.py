# SPDX-License-Identifier: Apache-2.0
"""Fetch freely licensed speech and cut it into utterances for training the puppets.

    python -m training.voices --out data/voices

Two sources, both Debian packages that are downloaded and unpacked below the output folder, never installed:

- *asterisk-core-sounds*: telephone prompts recorded by professional speakers in five languages, 16 kHz (G.722);
- *flite*: four small synthetic voices, which read simple sentences made from the word lists below.

Prompts are short, so those of one speaker are joined in random order with natural pauses to utterances of 12 to 20
seconds. English, Spanish, French and flite are for training; the Italian and the Russian speaker are held out.

The result is a folder of FLAC files (16 kHz, mono) and `index.jsonl`: one JSON object a line with `path`, `speaker`,
`language`, `gender`, `transcript` (or null), `seconds`, `licence`, `package`, `prompts` and `split`
(``train`` or ``held_out``). A run that was interrupted goes on where it stopped; files are renamed into place only when
they are complete, and the index is written last.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from talkingdit.atomic import whole_file, whole_folder, write_whole
from talkingdit.media.files import SPEECH_RATE
from talkingdit.media.opening import open_media

SHORTEST, LONGEST = 12.0, 20.0  # seconds of one utterance
PAUSES = (0.15, 0.5)  # seconds between two prompts
# Recordings that are not speech.
NOT_SPEECH = re.compile(r"^(silence/|beep|ascending-2tone|descending-2tone|confbridge-(join|leave)$|tt-monkeys)")


@dataclass(frozen=True)
class VoiceSource:
    """One speaker: where the recordings are, who speaks, under which licence, and for which split."""

    speaker: str
    language: str
    gender: str
    package: str
    folder: str
    licence: str
    split: str


RECORDED = (
    VoiceSource("allison", "en", "female", "asterisk-core-sounds-en", "en_US_f_Allison", "CC-BY-SA-3.0", "train"),
    VoiceSource("allison", "es", "female", "asterisk-core-sounds-es", "es_MX_f_Allison", "CC-BY-SA-3.0", "train"),
    VoiceSource("june", "fr", "female", "asterisk-core-sounds-fr", "fr_CA_f_June", "CC-BY-SA-3.0", "train"),
    VoiceSource("carlo", "it", "male", "asterisk-core-sounds-it", "it_IT_m_Carlo", "CC-BY-3.0", "held_out"),
    VoiceSource("ivrvoice", "ru", "female", "asterisk-core-sounds-ru", "ru_RU_f_IvrvoiceRU", "CC-BY-3.0", "held_out"),
)
SYNTHETIC = (
    VoiceSource("kal16", "en", "male", "flite", "", "BSD-style (CMU Flite)", "train"),
    VoiceSource("awb", "en", "male", "flite", "", "BSD-style (CMU Flite)", "train"),
    VoiceSource("rms", "en", "male", "flite", "", "BSD-style (CMU Flite)", "train"),
    VoiceSource("slt", "en", "female", "flite", "", "BSD-style (CMU Flite)", "train"),
)


def fetch_package(name: str, out: Path) -> Path:
    """Download one Debian package and unpack it below `out`; return the folder that holds its `usr`.

    Raises:
        RuntimeError: apt-get or dpkg-deb is missing, or the package could not be downloaded.
    """
    target = out / "packages" / name
    if target.is_dir():
        return target
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RuntimeError("voices: fetching the recordings needs apt-get and dpkg-deb (Debian or Ubuntu)")
    with whole_folder(target) as root, tempfile.TemporaryDirectory(dir=target.parent) as folder:
        done = subprocess.run(["apt-get", "download", name], cwd=folder, capture_output=True, text=True)
        archives = list(Path(folder).glob("*.deb"))
        if done.returncode or not archives:
            reason = (done.stderr.strip().splitlines() or ["no archive came"])[-1]
            raise RuntimeError(f"voices: package {name} could not be downloaded ({reason}); try `apt-get update` first")
        subprocess.run(["dpkg-deb", "-x", str(archives[0]), str(root)], check=True)
    return target


def decode_g722(path: Path) -> np.ndarray:
    """Decode a headerless G.722 file to float32 samples at 16 kHz; some prompts are empty, which PyAV does not open."""
    if not path.stat().st_size:
        return np.zeros(0, np.float32)
    with open_media(path, format="g722") as container:
        parts = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate([np.zeros(0, np.int16), *parts]).astype(np.float32) / 32768.0


def trim(samples: np.ndarray, margin: float = 0.04) -> np.ndarray:
    """Cut silence at both ends: everything 40 dB below the loudest 20 ms, but for a margin in seconds."""
    hop = SPEECH_RATE // 50
    if len(samples) < 2 * hop:
        return samples[:0]
    level = np.sqrt((samples[: len(samples) // hop * hop].reshape(-1, hop) ** 2).mean(1))
    loud = np.flatnonzero(level > 0.01 * level.max())
    if level.max() < 1e-4 or not len(loud):
        return samples[:0]
    edge = int(margin * SPEECH_RATE)
    return samples[max(0, loud[0] * hop - edge) : (loud[-1] + 1) * hop + edge]


def split_long(samples: np.ndarray) -> list[np.ndarray]:
    """Cut a recording that is longer than an utterance may be at the quietest places near its middle."""
    if len(samples) <= (LONGEST - 2) * SPEECH_RATE:
        return [samples]
    hop = SPEECH_RATE // 20
    level = (samples[: len(samples) // hop * hop].reshape(-1, hop) ** 2).mean(1)
    level = np.convolve(level, np.ones(3), "same")
    a, b = len(level) // 3, 2 * len(level) // 3
    cut = (a + int(np.argmin(level[a:b]))) * hop + hop // 2
    return [piece for half in (samples[:cut], samples[cut:]) for piece in split_long(trim(half))]


def read_transcripts(root: Path) -> dict[str, str]:
    """Prompt name -> text, from the list that ships with the recordings; remarks in brackets are left out."""
    texts: dict[str, str] = {}
    for path in root.glob("usr/share/doc/*/core-sounds-*.txt.gz"):
        for line in gzip.decompress(path.read_bytes()).decode("utf-8-sig").splitlines():
            name, colon, text = line.partition(":")
            text = re.sub(r"[\[(].*?[\])]", " ", text)
            text = re.sub(r"\s+", " ", text.replace("...", " ").replace("…", " ")).strip()
            if colon and text and not line.startswith(";"):
                texts[name.strip()] = text
    return texts


def recorded_prompts(source: VoiceSource, out: Path) -> Iterator[tuple[str, str | None, np.ndarray]]:
    """Yield (name, transcript or None, samples) for every spoken prompt of one recorded speaker."""
    root = fetch_package(f"{source.package}-g722", out) / "usr/share/asterisk/sounds" / source.folder
    texts = read_transcripts(fetch_package(source.package, out))
    for path in sorted(root.rglob("*.g722")):
        name = path.relative_to(root).with_suffix("").as_posix()
        if NOT_SPEECH.match(name):
            continue
        pieces = split_long(trim(decode_g722(path)))
        for number, piece in enumerate(pieces):
            if len(piece) > 0.2 * SPEECH_RATE:
                yield (name, texts.get(name), piece) if len(pieces) == 1 else (f"{name}#{number}", None, piece)


PEOPLE = (
    "my sister|the teacher|our neighbour|a young doctor|the old captain|every farmer|Maria|the boy|her uncle|nobody"
)
DEEDS = (
    "bought|painted|found|washed|carried|opened|remembered|borrowed|measured|wrapped up|threw away|asked for|showed me"
)
THINGS = (
    "a blue umbrella|the heavy box|three yellow apples|an enormous cake|the broken clock|a wooden chair"
    "|some fresh bread|the little garden|a pair of shoes|four bottles of juice|the evening paper"
    "|a map of the valley"
    "|two green lamps"
)
PLACES = (
    "in the kitchen|near the river|at the station|behind the church|on the way home|by the window|under the old bridge"
    "|across the street|in a small village|at the edge of the forest"
)
TIMES = (
    "this morning|a year ago|before breakfast|on Thursday afternoon|after the storm|in the middle of winter"
    "|every evening|while we were waiting|as soon as it was light|without saying a word"
)
QUESTIONS = "How do you know that|Who told you that|Are you sure|Would you believe|Did you hear that|Is it true that"


def sentences(count: int, seed: int = 0) -> list[str]:
    """Distinct simple English sentences built from the word lists above."""
    rng = random.Random(seed)
    people, deeds, things, places, times, questions = (
        words.split("|") for words in (PEOPLE, DEEDS, THINGS, PLACES, TIMES, QUESTIONS)
    )
    found: dict[str, None] = {}
    while len(found) < count:
        who, did, what, where, when = (rng.choice(words) for words in (people, deeds, things, places, times))
        shape = rng.randrange(4)
        if shape == 0:
            text = f"{who} {did} {what} {where} {when}."
        elif shape == 1:
            text = f"{when}, {who} {did} {what}."
        elif shape == 2:
            text = f"{rng.choice(questions)} {who} {did} {what} {where}?"
        else:
            text = f"{who} {did} {what}, and {rng.choice(people)} {rng.choice(deeds)} {rng.choice(things)} {when}."
        found[text[0].upper() + text[1:]] = None
    return list(found)


def synthetic_prompts(source: VoiceSource, out: Path, count: int) -> Iterator[tuple[str, str | None, np.ndarray]]:
    """Yield (name, text, samples) of sentences read by one flite voice; each voice reads its own sentences."""
    import soundfile

    program = fetch_package("flite", out) / "usr/bin/flite"
    library = next((fetch_package("libflite1", out) / "usr/lib").iterdir())
    env = {**os.environ, "LD_LIBRARY_PATH": str(library)}
    position = [voice.speaker for voice in SYNTHETIC].index(source.speaker)
    texts = sentences(count * len(SYNTHETIC))[position :: len(SYNTHETIC)]
    wav = out / f".{source.speaker}.wav"
    for number, text in enumerate(texts):
        subprocess.run([str(program), "-voice", source.speaker, "-t", text, "-o", str(wav)], env=env, check=True)
        samples, rate = soundfile.read(wav, dtype="float32")
        if rate != SPEECH_RATE:
            raise RuntimeError(f"voices: flite voice {source.speaker} speaks at {rate} Hz, expected {SPEECH_RATE}")
        yield f"sentence-{number:03d}", text, trim(samples)
    wav.unlink(missing_ok=True)


def utterances(
    prompts: list[tuple[str, str | None, np.ndarray]], seed: str
) -> Iterator[tuple[list[str], str | None, np.ndarray]]:
    """Join prompts in random order with pauses; yield (prompt names, transcript or None, samples) of 12-20 s each."""
    rng = random.Random(seed)
    queue = prompts[:]
    rng.shuffle(queue)
    while queue:
        names: list[str] = []
        texts: list[str | None] = []
        parts: list[np.ndarray] = []
        seconds = 0.0
        target = rng.uniform(SHORTEST, LONGEST - 3)
        while queue and seconds < target:
            # The first prompt that still fits; short ones (letters, digits) fill up what is left.
            fitting = (i for i, p in enumerate(queue) if seconds + len(p[2]) / SPEECH_RATE + PAUSES[1] <= LONGEST)
            index = next(fitting, None)
            if index is None:
                break
            name, text, samples = queue.pop(index)
            pause = np.zeros(int(rng.uniform(*PAUSES) * SPEECH_RATE), np.float32)
            parts += [samples, pause]
            names.append(name)
            texts.append(text)
            seconds += (len(samples) + len(pause)) / SPEECH_RATE
        if seconds >= SHORTEST:
            known = [text for text in texts if text is not None]
            yield names, " ".join(known) if len(known) == len(texts) else None, np.concatenate(parts)


def build(source: VoiceSource, out: Path, count: int) -> list[dict[str, object]]:
    """Write all utterances of one speaker; return their index records. Finished speakers are not made again."""
    import soundfile

    listing = out / f"{source.speaker}-{source.language}.json"
    if listing.exists():
        return json.loads(listing.read_text())
    folder = out / f"{source.speaker}-{source.language}"
    folder.mkdir(parents=True, exist_ok=True)
    total = count if source.package == "flite" else None
    prompts = synthetic_prompts(source, out, count) if source.package == "flite" else recorded_prompts(source, out)
    label = f"{source.speaker} ({source.language})"
    collected = list(tqdm(prompts, desc=label, total=total, unit="prompt", dynamic_ncols=True))
    records: list[dict[str, object]] = []
    for number, (names, text, samples) in enumerate(utterances(collected, f"{source.speaker}-{source.language}")):
        path = folder / f"{number:04d}.flac"
        with whole_file(path) as part:
            soundfile.write(part, np.clip(samples, -1, 1), SPEECH_RATE, format="FLAC", subtype="PCM_16")
        records.append(
            {
                "path": path.relative_to(out).as_posix(),
                "speaker": source.speaker,
                "language": source.language,
                "gender": source.gender,
                "transcript": text,
                "seconds": round(len(samples) / SPEECH_RATE, 3),
                "licence": source.licence,
                "package": source.package,
                "prompts": names,
                "split": source.split,
            }
        )
    write_whole(listing, json.dumps(records).encode())
    return records


def main(arguments: list[str] | None = None) -> None:
    """Command line: fetch, cut, write the index, and print minutes per speaker."""
    parser = argparse.ArgumentParser(prog="python -m training.voices", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/voices"), help="output folder (default: %(default)s)")
    parser.add_argument("--sentences", type=int, default=120, help="sentences read by each flite voice (120)")
    parser.add_argument("--keep-packages", action="store_true", help="keep the unpacked packages in OUT/packages")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, object]] = []
    for source in (*RECORDED, *SYNTHETIC):
        records += build(source, options.out, options.sentences)
    index = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_whole(options.out / "index.jsonl", index.encode())
    if not options.keep_packages:
        shutil.rmtree(options.out / "packages", ignore_errors=True)
    for split in ("train", "held_out"):
        for source in (*RECORDED, *SYNTHETIC):
            lengths = [
                float(str(r["seconds"]))
                for r in records
                if (r["speaker"], r["language"], r["split"]) == (source.speaker, source.language, split)
            ]
            if lengths:
                print(
                    f"{split:8s} {source.speaker:9s} {source.language}  {len(lengths):4d} utterances  "
                    f"{sum(lengths) / 60:6.1f} min"
                )


if __name__ == "__main__":
    main()
