# SPDX-License-Identifier: Apache-2.0
"""Folders as labs have them: uneven frame rates, tiny frames, failing networks, missing videos, awkward names."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import videos
from test_parts import judged

from talkingdit.cli.main import main
from talkingdit.eval import judge_video as judging
from talkingdit.eval import jwb_compat, parts
from talkingdit.eval.clip import in_step, is_even, read_clip, read_first
from talkingdit.eval.evidence import Evidence
from talkingdit.eval.job import Pair, SpokenText
from talkingdit.eval.judge_video import Judged, key_of
from talkingdit.eval.metric import Value
from talkingdit.eval.run import Results, Verdict
from talkingdit.eval.summary import comparisons, rows_of, worst_first
from talkingdit.eval.tables import latex, markdown
from talkingdit.lock import RunLock

SIDE = 32


def write(path: Path, levels: np.ndarray, times: np.ndarray, size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    """Grey frames of these levels, shown at these seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tick = Fraction(1, 1000)
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv444p"
        stream.time_base = stream.codec_context.time_base = tick
        for level, at in zip(levels, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), round(float(level)), np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(at * 1000), tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def evenly(path: Path, levels: np.ndarray, fps: float, size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    return write(path, levels, np.arange(len(levels)) / fps, size)


def evaluated(out: Path, *words: str) -> dict[str, Any]:
    assert main(["eval", "-o", str(out), "--finder", "drawn", "--regions", "whole", *words]) == 0
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


# ---- Times of frames -------------------------------------------------------------------------------------------------


def test_frames_of_uneven_times_are_those_of_even_ones(tmp_path: Path) -> None:
    """Half a second at 50 frames a second, then 2.5 s at 10: brightness is time, before and after."""
    times = np.concatenate([np.arange(25) / 50, 0.5 + np.arange(25) / 10])
    clip = read_clip(write(tmp_path / "phone.mp4", 10 + 70 * times, times))
    at = np.arange(len(clip.frames)) / clip.fps
    assert clip.seconds == pytest.approx(3.0, abs=0.1)
    assert np.abs(clip.frames[:, 0, 0, 0] - (10 + 70 * at)).max() <= 70 * 0.051 + 1  # half of the longest frame


@pytest.mark.parametrize(("fps", "even"), [(25.0, True), (29.97, True), (23.976, True)])
def test_even_frames_are_read_as_they_are(tmp_path: Path, fps: float, even: bool) -> None:
    assert is_even(evenly(tmp_path / "video.mp4", np.arange(60), fps)) is even


def test_frames_drift_apart_where_rates_differ_a_little() -> None:
    assert in_step(25.0, 25.2, 60)
    assert not in_step(25.0, 25.2, 100)  # the 100th are 32 ms apart, a frame is 40


def test_long_videos_of_nearly_one_rate_stay_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_SECONDS", 5.0)
    gen, truth = (
        evenly(tmp_path / f"{fps}.mp4", 20 + np.abs(100 * np.arange(20 * fps) / fps % 400 - 200), fps)
        for fps in (25.0, 24.8)
    )
    for part in parts.read_parts(gen, truth):
        assert part.truth is not None
        gaps = part.clip.frames[: len(part.truth.frames), 0, 0, 0].astype(float) - part.truth.frames[:, 0, 0, 0]
        assert np.abs(gaps).max() <= 5  # brightness changes by 4 in a frame


def test_the_published_protocol_compares_frames_of_equal_numbers(tmp_path: Path) -> None:
    gen = evenly(tmp_path / "gen.mp4", np.arange(60, 100), 25.0)
    truth = evenly(tmp_path / "truth.mp4", np.arange(60, 140, 2), 12.5)
    value = judged(gen, truth, ("ssim",), "jwb-compat").values["ssim[jwb-compat]|whole"]["value"]
    ones, twos = (read_first(path, 99, "").frames[..., ::-1] for path in (gen, truth))
    assert value == pytest.approx(jwb_compat.ssim(ones, twos))
    assert judged(gen, truth, ("ssim",)).values["ssim|whole"]["value"] != pytest.approx(value, abs=1e-3)


# ---- What goes wrong -------------------------------------------------------------------------------------------------


def test_frames_too_small_for_a_metric_cost_that_metric_alone(tmp_path: Path) -> None:
    evenly(tmp_path / "gen" / "tiny.mp4", np.arange(20), 25.0, (4, 4))
    evenly(tmp_path / "gen" / "usual.mp4", np.arange(20), 25.0)
    found = evaluated(tmp_path / "out", "--generated", str(tmp_path / "gen"), "--metrics", "motion,sharpness")
    values = {one["name"]: one["values"] for one in found["videos"]}
    assert "sides of at least 8 pixels, got 4x4" in values["tiny"]["motion[opencv-dis]|whole"]["missing"]
    assert "value" in values["tiny"]["sharpness[laplacian]|whole"]
    assert "value" in values["usual"]["motion[opencv-dis]|whole"]


@pytest.mark.parametrize("size", [(8, 640), (24, 96), (640, 8), (14, 40), (12, 12)])
def test_flow_between_long_pictures_ends_no_process(size: tuple[int, int]) -> None:
    """OpenCV's own ends in a segmentation fault; a banner among a lab's videos took the whole run with it."""
    import cv2

    from talkingdit.detect.motion import Flow, flow_between

    rng = np.random.default_rng(0)
    before, after = rng.integers(0, 256, (2, *size), dtype=np.uint8)
    for preset in (cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST, cv2.DISOPTICAL_FLOW_PRESET_FAST):
        assert flow_between(cv2.DISOpticalFlow.create(preset), before, after).shape == (*size, 2)
    colours = np.repeat(before[..., None], 3, axis=-1)
    assert np.isfinite(Flow()(colours, colours)).all()


def with_sharpness(monkeypatch: pytest.MonkeyPatch, measure: Any) -> None:
    known = judging.metrics_of("jwb")
    known["sharpness"] = dataclasses.replace(known["sharpness"], measure=measure)
    monkeypatch.setattr(judging, "metrics_of", lambda protocol: known)


def test_a_metric_that_fails_is_told_and_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        evenly(tmp_path / "gen" / f"{name}.mp4", np.arange(20) + (name == "b"), 25.0)
    words = ("--generated", str(tmp_path / "gen"), "--metrics", "motion,sharpness")

    def failing(evidence: Evidence, region: str) -> Value:
        if evidence.gen.name == "b.mp4":
            raise RuntimeError("no room on the card")
        return Value(1.0)

    with monkeypatch.context() as patch:
        with_sharpness(patch, failing)
        found = evaluated(tmp_path / "out", *words)
    (values,) = [one["values"] for one in found["videos"] if one["name"] == "b"]
    assert values["sharpness[laplacian]|whole"] == {"missing": "failed: RuntimeError: no room on the card"}
    assert "value" in values["motion[opencv-dis]|whole"]
    said = capsys.readouterr().err
    assert "sharpness[laplacian]|whole failed for 1 of 2 videos" in said
    assert "no room on the card" in said
    again = evaluated(tmp_path / "out", *words)
    assert all("value" in one["values"]["sharpness[laplacian]|whole"] for one in again["videos"])


def test_a_metric_that_fails_everywhere_ends_in_an_error_behind_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evenly(tmp_path / "gen" / "a.mp4", np.arange(20), 25.0)

    def failing(evidence: Evidence, region: str) -> Value:
        raise RuntimeError("wrong input")

    with_sharpness(monkeypatch, failing)
    given = ["--generated", str(tmp_path / "gen"), "--metrics", "motion,sharpness", "--regions", "whole"]
    assert main(["eval", *given, "-o", str(tmp_path / "out"), "--finder", "drawn"]) == 2
    assert "sharpness[laplacian]|whole failed for every video" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").is_file()


def test_what_is_not_a_number_is_no_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evenly(tmp_path / "gen" / "a.mp4", np.arange(20), 25.0)
    with_sharpness(monkeypatch, lambda evidence, region: Value(float("nan")))
    found = evaluated(tmp_path / "out", "--generated", str(tmp_path / "gen"), "--metrics", "motion,sharpness")
    assert {one["metric"] for one in found["systems"]} == {"motion[opencv-dis]"}
    assert "not a number" in found["videos"][0]["values"]["sharpness[laplacian]|whole"]["missing"]


# ---- What is kept ----------------------------------------------------------------------------------------------------


def test_values_outlive_runs_with_other_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evenly(tmp_path / "gen" / "a.mp4", np.arange(20), 25.0)
    given = ("--generated", str(tmp_path / "gen"), "--metrics")
    evaluated(tmp_path / "out", *given, "sharpness")
    evaluated(tmp_path / "out", *given, "motion")
    monkeypatch.setattr("talkingdit.eval.run.judge", None)  # nothing is left to measure
    found = evaluated(tmp_path / "out", *given, "sharpness,motion")
    assert len(found["systems"]) == 2


def test_both_protocols_share_a_folder(tmp_path: Path) -> None:
    import torch

    class Pooled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)

    torch.jit.trace(Pooled(), torch.zeros(1, 3, 299, 299)).save(tmp_path / "net.pt")
    for i in range(2):
        evenly(tmp_path / "gen" / f"{i}.mp4", np.arange(20) + i, 25.0)
        evenly(tmp_path / "truth" / f"{i}.mp4", np.arange(20) * 2 + i, 25.0)
    given = ["--generated", f"ours={tmp_path / 'gen'}", "--truth", str(tmp_path / "truth"), "--metrics", "fid"]
    given += ["--backbone", f"inception={tmp_path / 'net.pt'}"]
    names = []
    for protocol in ("jwb", "jwb-compat", "jwb"):
        found = evaluated(tmp_path / "out", *given, "--protocol", protocol)
        (ours,) = [one for one in found["systems"] if one["system"] == "ours"]
        names.append(ours["metric"])
    assert names[0].startswith("fid[net-")
    assert names[1].startswith("fid[jwb-compat,net-")
    assert names[2] == names[0]


def test_one_run_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evenly(tmp_path / "gen" / "a.mp4", np.arange(20), 25.0)
    (tmp_path / "out").mkdir()
    given = ["eval", "--generated", str(tmp_path / "gen"), "--metrics", "sharpness", "-o", str(tmp_path / "out")]
    with RunLock(tmp_path / "out" / ".eval.lock", "", "talkingdit eval"):
        assert main([*given, "--finder", "drawn"]) == 2
    assert "is at work there" in capsys.readouterr().err
    assert main([*given, "--finder", "drawn"]) == 0
    assert not (tmp_path / "out" / ".eval.lock").exists()


def test_no_verdict_of_a_judge_is_asked_for_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(4):
        for system in ("ours", "base"):
            evenly(tmp_path / system / f"{i}.mp4", np.arange(20) + i + 10 * (system == "ours"), 25.0)
    program, log = tmp_path / "judge.sh", tmp_path / "asked"
    fails = f'[ -e {tmp_path}/broken ] && [ "$(wc -l < {log})" = 2 ] && exit 1'
    program.write_text(f"#!/bin/sh\n{fails}\necho >> {log}\necho 0\n")
    program.chmod(0o755)
    (tmp_path / "broken").touch()
    log.touch()
    given = ["eval", "--generated", str(tmp_path / "base"), "--generated", str(tmp_path / "ours"), "--finder", "drawn"]
    given += ["--metrics", "sharpness", "--regions", "whole", "-o", str(tmp_path / "out"), "--judge", str(program)]
    assert main(given) == 2
    assert not (tmp_path / "out" / "win_rates.json").exists()
    (tmp_path / "broken").unlink()
    assert main(given) == 0
    assert len(log.read_text().splitlines()) == 4
    assert json.loads((tmp_path / "out" / "win_rates.json").read_text())["systems"]["ours"]["rate"] == 0.5


# ---- What tables say -------------------------------------------------------------------------------------------------


def test_missing_short_and_stretched_videos_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        evenly(tmp_path / "truth" / f"{name}.mp4", np.arange(40), 25.0)
    evenly(tmp_path / "ours" / "a.mp4", np.arange(20), 25.0)
    evenly(tmp_path / "ours" / "b.mp4", np.arange(40), 25.0, (SIDE, 2 * SIDE))
    (tmp_path / "texts.jsonl").write_text('{"name": "A", "text": "hello"}\n')
    found = evaluated(
        tmp_path / "out",
        *("--generated", str(tmp_path / "ours"), "--truth", str(tmp_path / "truth"), "--metrics", "ssim"),
        *("--texts", str(tmp_path / "texts.jsonl")),
    )
    assert len(found["remarks"]) == 3
    said = capsys.readouterr().err
    assert "ours has no video called c (1 missing)" in said
    assert "1 of 2 videos of ours end before nine tenths of their true ones" in said
    assert "1 of 2 videos of ours have other proportions" in said
    assert "3 of 3 videos have no text" in said
    assert "1 of 1 texts are of no video here" in said
    assert "ours has no video called c" in (tmp_path / "out" / "report.html").read_text()
    assert "ours has no video called c" in (tmp_path / "out" / "table.md").read_text()


def test_names_that_differ_in_case_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evenly(tmp_path / "truth" / "Anna.mp4", np.arange(9), 25.0)
    evenly(tmp_path / "ours" / "anna.MP4", np.arange(9), 25.0)
    given = ["--generated", str(tmp_path / "ours"), "--truth", str(tmp_path / "truth"), "-o", str(tmp_path / "out")]
    assert main(["eval", *given]) == 2
    assert "no video called anna (but Anna, whose case differs)" in capsys.readouterr().err


def made(values: dict[str, list[float]]) -> Results:
    """Results of systems with these values of SSIM; each video is its own truth of the name "truth"."""
    tools = judging.Tools.of(judging.JudgePlan(("ssim", "psnr"), ("whole",), finder="drawn"))
    keys = [key_of(metric, region, tools) for metric, region in tools.possible()]
    verdicts = [
        Verdict(
            Pair(system, str(i), Path(f"{system}{i}"), Path(f"truth{i}"), SpokenText("")),
            Judged({key: {"value": value, "curve": [], "note": ""} for key in keys}, facts={"frames": 1}),
        )
        for system, its in values.items()
        for i, value in enumerate(its)
    ]
    return Results(verdicts, tools)


def test_p_values_are_adjusted_for_tests_of_systems_alone() -> None:
    """True videos against the baseline are no test that anybody asked for."""
    rng = np.random.default_rng(0)
    base, ours = rng.random(10).tolist(), rng.random(10).tolist()
    results = made({"ground truth": [1.0] * 10, "base": base, "ours": ours})
    found = comparisons(results, rows_of(results), "base")
    assert [(one.row.full_name, one.system) for one in found] == [("ssim", "ours"), ("psnr", "ours")]
    assert [one.p for one in found] == [min(1.0, 2 * one.difference.p) for one in found]


def test_equal_values_make_no_video_worse_than_another() -> None:
    ranks = [badness for badness, _ in worst_first(made({"ours": [0.5] * 4}), rows_of(made({"ours": [0.5] * 4})))]
    assert ranks == [0.5] * 4


def test_awkward_names_stay_names() -> None:
    results = made({r"a_b&50%~^\x|<i>": [0.5, 0.6], "c": [0.1, 0.2]})
    rows = rows_of(results)
    assert (
        r"a\_b\&50\%\textasciitilde{}\textasciicircum{}\textbackslash{}x\textbar{}\textless{}i\textgreater{}"
        in latex(results, rows)
    )
    assert r"| a\_b&50%~^\\x\|\<i\> | c |" in markdown(results, rows)


def test_names_that_are_no_text_reach_every_file(tmp_path: Path) -> None:
    folder = tmp_path / "gen"
    evenly(folder / "a.mp4", np.arange(9), 25.0).rename(folder / b"\xff.mp4".decode(errors="surrogateescape"))
    evaluated(tmp_path / "out", "--generated", f"ours={folder}", "--metrics", "sharpness")
    assert r"\udcff" in (tmp_path / "out" / "videos.csv").read_text()
    assert r"\udcff" in (tmp_path / "out" / "report.html").read_text()


def test_the_truth_is_perfect_through_another_path(tmp_path: Path) -> None:
    truth, _, _ = videos.folders(tmp_path, 1)
    (tmp_path / "link").symlink_to(truth)
    found = evaluated(tmp_path / "out", "--generated", str(tmp_path / "link"), "--truth", str(truth))
    of = {(one["metric"], one["system"]): one for one in found["systems"] if one["perfect"] is not None}
    assert of
    assert all(one["value"] == pytest.approx(one["perfect"], abs=1e-9) for one in of.values())
