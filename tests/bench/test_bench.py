# SPDX-License-Identifier: Apache-2.0
"""Benchmarks write results that the README table can be made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import cases, harness, record, report
from bench.__main__ import main

KEYS = {
    "op",
    "shape",
    "tokens",
    "dtype",
    "direction",
    "bytes",
    "median_us",
    "p20_us",
    "p80_us",
    "gbps",
    "share_of_copy",
}

RESULT = {
    "name": "rope3d",
    "machine": "Some CPU, 2 cores",
    "device": "cpu",
    "threads": 2,
    "versions": {"torch": "2.13.0"},
    "commit": "0123456789ab",
    "quick": False,
    "copy_gbps": 44.0,
    "rows": [
        {
            "op": "rope3d",
            "shape": "wan-1.3b-6240",
            "dtype": "float32",
            "direction": "forward",
            "median_us": 4000.0,
            "gbps": 19.17,
            "share_of_copy": 0.4357,
            "out_us": 2000.0,
            "out_gbps": 38.34,
            "out_share_of_copy": 0.871,
            "baselines": {"eager": 33000.0, "official": 73000.0},
        },
        {
            "op": "rope3d",
            "shape": "wan-1.3b-6240",
            "dtype": "bfloat16",
            "direction": "backward",
            "median_us": 1234.5,
            "gbps": 31.05,
            "share_of_copy": 0.7057,
            "baselines": {"eager": 1234.5},
        },
    ],
}


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_contestants_apart_time_themselves():
    """A large result of one must not take the memory that another has freed: each has a process of its own."""
    quick = harness.Setting(torch.device("cpu"), quick=True, dtypes=(torch.bfloat16,), apart=True)
    backward = list(harness.cases_of(cases.load("rope3d"), quick))[1]
    row = harness.run_case(backward, quick, "rope3d", 1)
    assert row["direction"] == "backward"
    assert set(row["baselines"]) == {"eager", "official"}
    assert set(row["page_faults"]) == {"ours", "copy", "eager", "official"}
    assert min(row["median_us"], row["copy_us"], *row["baselines"].values()) > 0
    with pytest.raises(RuntimeError, match="the process of a contestant must answer, it ended"):
        harness.run_case(backward, quick, "rope3d", 7)


def save(folder: Path, **changes: object) -> None:
    result = {**RESULT, **changes}
    record.save(result, folder, "cpu")


@pytest.fixture
def root(tmp_path):
    """A repository with the two documents that a report is written into."""
    for name in (report.PAGE, report.README):
        document = tmp_path / name
        document.parent.mkdir(exist_ok=True)
        document.write_text(f"# Head\n\n{report.BEGIN}\nold figures\n{report.END}\n\nTail\n")
    return tmp_path


def write_report(root: Path) -> int:
    return main(["report", "--out", str(root / "results"), "--into", str(root)])


def test_report_replaces_only_what_is_between_the_markers(root):
    save(root / "results")
    save(root / "results", name="tried", quick=True)
    for _ in range(2):  # a second time finds its own table and changes nothing
        assert write_report(root) == 0
        for name in (report.PAGE, report.README):
            text = (root / name).read_text()
            assert text.startswith(f"# Head\n\n{report.BEGIN}\n")
            assert text.endswith(f"{report.END}\n\nTail\n")
            assert "old figures" not in text
    text = (root / report.PAGE).read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows == [
        "| `rope3d` | wan-1.3b-6240 | fp32 | forward | 4,000 / 2,000 | 19.2 / 38.3 | 44% / 87% | eager 8.2, official 18.2 |",  # noqa: E501
        "| `rope3d` | wan-1.3b-6240 | bf16 | backward | 1,234 | 31.1 | 71% | eager 1.0 |",
    ]
    assert "Some CPU, 2 cores, 2 threads; torch 2.13.0; copy 44 GB/s; commit 0123456789ab." in text


def test_a_gpu_has_a_table_with_the_best_baseline_and_one_of_whole_blocks(tmp_path):
    gpu = {**RESULT, "device": "Some GPU", "copy_gbps": 2000.0}
    row = {**RESULT["rows"][0], "dtype": "bfloat16", "median_us": 400.0, "gbps": 1800.0, "share_of_copy": 0.9}
    row = {key: value for key, value in row.items() if not key.startswith("out_")}
    row["baselines"] = {"eager": 3000.0, "official": 8000.0}
    record.save({**gpu, "rows": [row]}, tmp_path, "cuda")
    alone = {**row, "shape": "another", "baselines": {"compile": 800.0}}
    compiled = [{**row, "median_us": 444.0, "baselines": {"compile": 500.0}}, alone]
    record.save({**gpu, "name": "rope3d-compiled", "rows": compiled}, tmp_path, "cuda")
    step = {
        "shape": "14b", "tokens": 32760, "blocks": 1, "median_us": 30000.0, "official_us": 60000.0, "time_ratio": 0.5,
        "peak_bytes": 10**9, "official_peak_bytes": 4 * 10**9, "peak_ratio": 0.25,
        "moved_bytes": 2 * 10**9, "official_moved_bytes": 10**10, "moved_ratio": 0.2,
    }  # fmt: skip
    block = {key: value for key, value in gpu.items() if key not in ("rows", "copy_gbps")}
    record.save({**block, "name": "block", "steps": [step]}, tmp_path, "cuda")
    (tmp_path / "problems.json").write_text("[]")
    (tmp_path / "small.json").write_text('{"failed": []}')
    text = report.table(report.load(tmp_path))
    assert "Some GPU (Some CPU, 2 cores); torch 2.13.0; copy 2,000 GB/s; commit 0123456789ab." in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows == [
        "| op | shape | dtype | direction | µs | GB/s | share of copy | faster than the best | times faster than |",
        "| `rope3d` | wan-1.3b-6240 | bf16 | forward | 400 | 1,800 | 90% | 1.25 (compile) | eager 7.5, official 20.0, compile 1.2 |",  # noqa: E501
        "| `rope3d` | another | bf16 | forward | 400 | 1,800 | 90% | 2.00 (compile) | compile 2.0 |",
        "| what | shape | tokens | µs | official µs | time | peak memory | official | ratio | moved | ratio |",
        "| block, 1 block | 14b | 32,760 | 30,000 | 60,000 | 0.50 | 1.00 GB | 4.00 GB | 0.25 | 2.00 GB | 0.20 |",
    ]


def test_a_report_is_of_ops_against_baselines_alone(tmp_path):
    """A comparison of two builds, which `bench before` leaves in the same folder, has no baselines to show."""
    save(tmp_path)
    (expected,) = report.load(tmp_path)
    save(tmp_path, name="before", rows=[{"op": "rope3d", "shape": "tiny", "old_us": 2.0, "new_us": 1.0}])
    assert report.load(tmp_path) == [expected]


def test_a_gpu_row_has_the_time_of_the_kernel_that_is_chosen_today(tmp_path):
    """Not that of the one that was chosen when it was measured, which was what the table was filled from."""
    row = {
        **RESULT["rows"][0], "op": "frame_linear", "shape": "wan-s2v-14b-448x832", "dtype": "bfloat16",
        "bytes": 600_000_000, "median_us": 474.0, "out_us": 475.0, "copy_us": 150.0,
        "baselines": {"eager": 717.0, "general": 475.0, "cutlass": 250.0},
    }  # fmt: skip
    other = {**row, "shape": "another"}
    later = {**row, "shape": "wan-s2v-14b-448x832 fp32 stream", "median_us": 249.0}
    record.save(
        {**RESULT, "device": "NVIDIA H200", "name": "frame_linear", "rows": [row, other, later]}, tmp_path, "cuda"
    )
    (result,) = report.load(tmp_path)
    shown, unknown, chosen_then = result["rows"]
    assert (shown["median_us"], shown["gbps"], shown["share_of_copy"]) == (250.0, 2400.0, 0.6)
    assert shown["baselines"] == {"eager": 717.0, "general": 475.0}
    assert "out_us" not in shown
    assert unknown == other
    assert chosen_then == later


def test_the_readme_has_the_headlines_and_the_chart(root):
    first = {**RESULT["rows"][0], "dtype": "bfloat16"}
    rows = [first, {**first, "dtype": "float32"}, {**first, "shape": "another"}, {**first, "direction": "backward"}]
    chosen = [name for name in cases.names() if cases.load(name).headline]
    assert len(chosen) == 5
    for name in chosen:
        headline = cases.load(name).headline
        save(root / "results", name=name, rows=[{**row, "op": op} for op in (headline, "other") for row in rows])
    assert write_report(root) == 0
    text = (root / report.README).read_text()
    shown = [line.split(" | ")[:4] for line in text.splitlines() if line.startswith("| `")]
    assert shown == [[f"| `{cases.load(name).headline}`", "wan-1.3b-6240", "bf16", "forward"] for name in chosen]
    assert f"]({report.FIGURE})" in text
    with Image.open(root / report.FIGURE) as picture:
        assert picture.width > picture.height > 200


def test_a_whole_block_has_times_and_no_bandwidth(root):
    row = {**RESULT["rows"][0], "op": "accelerate", "baselines": {"diffusers": 4200.0}}
    save(root / "results", name="accelerate", rows=[row])
    assert write_report(root) == 0
    lines = (root / report.PAGE).read_text().splitlines()
    assert [line for line in lines if line.startswith("| ")] == [
        "| block | shape | dtype | direction | µs | times faster than |",
        "| `accelerate` | wan-1.3b-6240 | fp32 | forward | 4,000 | diffusers 1.05 |",
    ]


def test_results_of_uncommitted_changes_are_refused(root, capsys):
    save(root / "results", commit="0123456789ab-dirty")
    assert write_report(root) == 1
    assert capsys.readouterr().err == (
        "bench report: cpu-rope3d.json was measured with uncommitted changes (0123456789ab-dirty): commit them and "
        "run `python -m bench rope3d` again\n"
    )
    assert "old figures" in (root / report.README).read_text()


@pytest.mark.parametrize("text", ["no markers", report.BEGIN, f"{report.END} {report.BEGIN}"])
def test_a_readme_without_both_markers_is_refused_and_nothing_written(root, text, capsys):
    save(root / "results")
    (root / report.README).write_text(text)
    assert write_report(root) == 1
    assert "README.md must hold the markers <!-- bench:start --> and <!-- bench:end -->" in capsys.readouterr().err
    assert (root / report.README).read_text() == text
    assert "old figures" in (root / report.PAGE).read_text()
    assert not (root / report.FIGURE).exists()


def test_report_says_when_nothing_was_measured(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path)]) == 1
    assert "run `python -m bench all` first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "ops"),
    [
        ("rope3d", {"rope3d"}),
        ("modulate", {"norm_modulate", "gate_residual", "gate_residual_norm_modulate"}),
        ("window_fusion", {"window_fusion", "fused_window_step"}),
    ],
)
def test_a_quick_run_writes_every_row_with_every_key(tmp_path, what, ops):
    assert main([what, "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / f"cpu-{what}.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == [f"cpu-{what}.json"]  # no half-written file beside it
    assert {"machine", "device", "versions", "commit", "copy_gbps", "rows"} <= result.keys()
    assert result["quick"] is True
    assert {row["op"] for row in result["rows"]} == ops
    for row in result["rows"]:
        assert row.keys() >= KEYS
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["gbps"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3, rel=1e-2)
        assert ("out_us" in row) == (row["direction"] != "backward")
        assert "eager" in row["baselines"]


def test_a_baseline_that_computes_something_else_is_not_timed():
    case = cases.Case(
        "double", "tiny", 4, torch.float32, "forward", 32, lambda: (torch.ones(4),),
        ours=lambda x, out=None: torch.mul(x, 2, out=out), baselines={"eager": lambda x: x * 2.1},
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"eager and double \(tiny, torch.float32, forward\) must agree"):
        harness.run_case(case, harness.Setting(torch.device("cpu"), quick=True))
