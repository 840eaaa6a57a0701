# SPDX-License-Identifier: Apache-2.0
"""The command from folders of videos to tables and a report."""

from __future__ import annotations

import csv
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import videos

from talkingdit.cli.main import main

METRICS = "ssim,psnr,csim,efid,sync_r,sync_offset,fid,found"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    videos.folders(folder)
    assert main(words(folder)) == 0
    return folder


def words(root: Path, *more: str) -> list[str]:
    systems = ["--generated", f"soft={root / 'soft'}", "--generated", f"sharp={root / 'sharp'}"]
    rest = ["--truth", str(root / "truth"), "-o", str(root / "out"), "--finder", "drawn", "--metrics", METRICS]
    return ["eval", *systems, *rest, *more]


def results(root: Path) -> dict[str, dict[str, float]]:
    found = json.loads((root / "out" / "results.json").read_text())
    out: dict[str, dict[str, float]] = {}
    for one in found["systems"]:
        out.setdefault(f"{one['metric']}|{one['region']}", {})[one["system"]] = one["value"]
    return out


def test_systems_are_ordered_and_the_truth_is_perfect(root: Path) -> None:
    found = results(root)
    for key in ("ssim|whole", "ssim|face", "psnr|whole", "psnr|face", "csim[drawn-colours]|face"):
        assert found[key]["soft"] < found[key]["sharp"] < found[key]["ground truth"], key
    assert found["ssim|whole"]["ground truth"] == 1.0
    assert found["efid[mesh]|face"]["ground truth"] == pytest.approx(0, abs=1e-9)
    assert found["found|face"]["soft"] == 1.0


def test_files_agree(root: Path) -> None:
    out, found = root / "out", results(root)
    with open(out / "systems.csv") as file:
        rows = {(row["metric"], row["region"], row["system"]): float(row["value"]) for row in csv.DictReader(file)}
    assert rows[("ssim", "whole", "soft")] == found["ssim|whole"]["soft"]
    with open(out / "videos.csv") as file:
        single = [
            r for r in csv.DictReader(file) if (r["system"], r["metric"], r["region"]) == ("soft", "ssim", "whole")
        ]
    assert [row["video"] for row in single] == ["clip0", "clip1"]
    assert sum(float(row["value"]) for row in single) / 2 == pytest.approx(found["ssim|whole"]["soft"])
    table = (out / "table.md").read_text()
    assert table.index("SSIM") < table.index("PSNR") < table.index("Face")  # the papers' order
    assert "FID: give: --backbone inception=PATH" in table
    latex = (out / "table.tex").read_text()
    assert latex.count("&") % 4 == 0
    assert r"csim[drawn-colours]" in latex
    assert r"\textbf{" in latex


class Page(HTMLParser):
    """Addresses that a page loads from, and its headings."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_is_one_file_with_the_worst_first(root: Path) -> None:
    page = Page()
    page.feed((root / "out" / "report.html").read_text())
    assert len(page.sources) == 4
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert page.text.index("soft: clip") < page.text.index("sharp: clip")
    assert "Against soft" in page.text
    assert "few samples" in page.text


def test_second_run_measures_nothing_and_a_new_metric_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from talkingdit.eval import run

    asked: list[tuple[str, ...]] = []
    real = run.judge

    def counted(pair, tools, skip=()):  # type: ignore[no-untyped-def]
        asked.append(tuple(m.name for m, region in tools.possible() if run.key_of(m, region, tools) not in skip))
        return real(pair, tools, skip)

    monkeypatch.setattr(run, "judge", counted)
    before = results(root)
    assert main(words(root)) == 0
    assert asked == []
    assert results(root) == before
    assert main([*words(root)[:-1], METRICS + ",pixel_cosine", "--regions", "whole"]) == 0
    assert asked == [("pixel_cosine",)] * 6
    # A file with other bytes is judged anew, one with another name is not.
    asked.clear()
    copy = root / "changed"
    shutil.copytree(root / "soft", copy / "soft")
    shutil.copytree(root / "truth", copy / "truth")
    os.rename(copy / "soft" / "clip0.mp4", copy / "soft" / "other.mp4")
    os.rename(copy / "truth" / "clip0.mp4", copy / "truth" / "other.mp4")
    (copy / "soft" / "clip1.mp4").write_bytes((root / "sharp" / "clip0.mp4").read_bytes())
    given = ["--generated", f"soft={copy / 'soft'}", "--truth", str(copy / "truth"), "-o", str(root / "out")]
    assert main(["eval", *given, "--finder", "drawn", "--metrics", "ssim", "--regions", "whole"]) == 0
    assert asked == [("ssim",)]


def test_two_workers_find_the_same(root: Path) -> None:
    assert main(words(root)) == 0
    before = results(root)
    shutil.rmtree(root / "out")
    assert main(words(root, "--workers", "2")) == 0
    assert results(root) == before


def test_a_damaged_file_of_what_is_known_is_measured_again(root: Path) -> None:
    assert main(words(root)) == 0
    before = results(root)
    kept = sorted((root / "out" / "videos").glob("*.json"))
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    kept[1].with_suffix(".safetensors").write_bytes(b"")
    assert main(words(root)) == 0
    assert results(root) == before
    assert not list((root / "out").rglob("*.part*"))


def test_win_rates_of_a_judge(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = root / "judge.sh"
    program.write_text('#!/bin/sh\ncase "$1" in *sharp*) echo 1;; *) echo 2;; esac\n')
    program.chmod(0o755)
    assert main(words(root, "--judge", str(program))) == 0
    assert "win rate of sharp against soft: 100.0 % of 2" in capsys.readouterr().out
    assert json.loads((root / "out" / "win_rates.json").read_text())["systems"]["sharp"]["n"] == 2


def test_a_broken_video_costs_itself_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "broken"
    shutil.copytree(root / "soft", folder)
    (folder / "clip0.mp4").write_bytes(b"no video")
    given = ["--generated", f"bad={folder}", "--truth", str(root / "truth"), "-o", str(root / "out_broken")]
    assert main(["eval", *given, "--finder", "drawn", "--metrics", "ssim", "--regions", "whole"]) == 0
    told = capsys.readouterr()
    assert "clip0.mp4" in told.err
    assert "3 videos judged; 1 could not be read" in told.out
    found = json.loads((root / "out_broken" / "results.json").read_text())
    assert {one["n"] for one in found["systems"] if one["system"] == "bad"} == {1}
    assert {one["missing"] for one in found["systems"] if one["system"] == "bad"} == {1}


def test_published_protocol(root: Path) -> None:
    import numpy as np

    from talkingdit.eval import jwb_compat
    from talkingdit.media.files import read_video

    given = ["--generated", f"soft={root / 'soft'}", "--truth", str(root / "truth"), "-o", str(root / "out_compat")]
    more = ["--protocol", "jwb-compat", "--finder", "drawn", "--metrics", "ssim,psnr,csim"]
    assert main(["eval", *given, *more]) == 0
    found = json.loads((root / "out_compat" / "results.json").read_text())
    means = {(one["metric"], one["region"], one["system"]): one["value"] for one in found["systems"]}
    pairs = [
        tuple(read_video(root / which / f"clip{i}.mp4")[0][..., ::-1] for which in ("soft", "truth")) for i in (0, 1)
    ]
    expected = np.mean([jwb_compat.csim(*pair) for pair in pairs])
    assert means[("csim[jwb-compat]", "whole", "soft")] == pytest.approx(expected)
    assert means[("psnr[jwb-compat]", "whole", "ground truth")] == "inf"
    assert ("csim[jwb-compat]", "face", "soft") in means


def test_list_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list", "--finder", "drawn"]) == 0
    told = capsys.readouterr().out
    assert "fid: " in told
    assert "not available; give: --backbone inception=PATH" in told
    assert "csim[drawn-colours]" in told


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--generated", "a=nowhere", "-o", "out"], "there is no folder or file 'nowhere'"),
        (["-o", "out"], "the following arguments are required: --generated"),
        (["--generated", "a=x", "--generated", "a=y", "-o", "out"], "'a' is the name of two systems"),
        (["--generated", "a=x", "-o", "out", "--metrics", "sim"], "got 'sim'"),
        (["--generated", "a=x", "-o", "out", "--regions", "foot"], "got 'foot'"),
        (["--generated", "a=x", "-o", "out", "--backbone", "knee=x"], "no slot is called 'knee'"),
        (["--generated", "a=x", "-o", "out", "--baseline", "b"], "expected one of a, got 'b'"),
    ],
)
def test_mistakes_are_one_sentence(
    given: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "knee=x" in given:
        (tmp_path / "x").mkdir()
        videos.write(tmp_path / "x" / "a.mp4", *_tiny())
    assert main(["eval", *given]) == 2
    told = capsys.readouterr().err.strip()
    assert sentence in told
    assert "\n" not in told


def _tiny():  # type: ignore[no-untyped-def]
    (script,) = videos.scripts(1, 4, 64)
    return script, script.draw()


def test_results_take_the_place_of_earlier_results_alone(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*given: str) -> str:
        assert main(["eval", *given]) == 2
        return capsys.readouterr().err

    soft, out = f"soft={root / 'soft'}", tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("mine")
    assert "a report.html of another origin" in refused("--generated", soft, "-o", str(out))
    (out / "videos").mkdir()
    texts = out / "videos.csv"
    texts.write_text("name,text\nclip0,a\n")
    assert "got the one given as --texts" in refused("--generated", soft, "-o", str(out), "--texts", str(texts))
    assert "got the one given as --truth" in refused(
        "--generated", soft, "-o", str(out), "--truth", str(out / "videos")
    )
    assert (out / "report.html").read_text() == "mine"
    assert texts.read_text() == "name,text\nclip0,a\n"
    assert {path.name for path in out.iterdir()} == {"report.html", "videos", "videos.csv"}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--generated", "ground truth={}"], "'ground truth' is the name of the true videos"),
        (["--backbone", "clip={}", "--backbone", "clip={}"], "'clip' is given twice"),
        (["--generated", "b={}", "--judge", ""], "there is no such program"),
        (["--generated", "b={}", "--judge", "no-such-program"], "there is no such program"),
        (["--generated", "b={}", "--judge", "a 'b"], "expected words of a command"),
        (["--calibrate", "-o", "{}/clip0.mp4"], "results cannot be written to"),
    ],
)
def test_mistakes_are_told_before_anything_is_judged(
    root: Path, tmp_path: Path, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(root / "soft")
    given = ["--generated", f"a={folder}", "-o", str(tmp_path / "out"), *(word.format(folder) for word in more)]
    assert main(["eval", *given, "--finder", "drawn"]) == 2
    told = capsys.readouterr().err.strip()
    assert sentence in told
    assert "\n" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.csv", 'name,text\nclip0.mp4,"two\nlines"\n', "two\nlines"),
        ("a.jsonl", '{"name": "clip0", "text": "a\u2028b"}\n', "a\u2028b"),
    ],
)
def test_texts_may_have_lines(tmp_path: Path, name: str, content: str, found: str) -> None:
    from talkingdit.eval.job import read_texts

    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_texts(tmp_path / name)["clip0"].words == found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"name": "a", "text": 3}', "entry 1: expected name and text"),
        ('{"name": ["a"], "text": "b"}', "entry 1: expected name and text"),
        ('{"name": "a", "text": "b"}\n{"name": "a.mp4", "text": "c"}', "entry 2: expected one entry for each video"),
    ],
)
def test_texts_that_are_none_are_refused(tmp_path: Path, content: str, said: str) -> None:
    from talkingdit.errors import UserError
    from talkingdit.eval.job import read_texts

    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        read_texts(tmp_path / "a.jsonl")


def test_the_page_says_what_protocols_do_differently() -> None:
    from talkingdit.eval.tables import deviations_markdown

    assert deviations_markdown() in (Path(__file__).parents[2] / "docs" / "eval.md").read_text()


def test_two_calibrations_into_one_folder_do_not_meet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of one would stand beside the figure of the other."""
    from talkingdit.eval import calibration

    met = []

    def measured() -> list:  # the other one comes by while this one measures
        if not met:
            met.append(None)
            met.append(main(["eval", "--calibrate", "-o", str(tmp_path)]))
        return []

    monkeypatch.setattr(calibration, "calibrate", measured)
    monkeypatch.setattr(calibration, "figure", lambda curves: "<svg/>")
    assert main(["eval", "--calibrate", "-o", str(tmp_path)]) == 0
    assert met[1] == 2
    assert f"talkingdit: {tmp_path}: another run (talkingdit eval, process" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"calibration.json", "calibration.svg"}
