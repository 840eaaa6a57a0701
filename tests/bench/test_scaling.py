# SPDX-License-Identifier: Apache-2.0
"""The ledger against sums by hand; files and tables of counts."""

import json
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import report, scaling
from bench.ledger import Ledger, cluster
from talkingdit.nn.context_parallel import all_to_all


@pytest.fixture
def ledger():
    """Of rank 0 of two nodes of 8."""
    with cluster(16), FakeTensorMode(), Ledger(8) as found:
        yield found


def entry(ledger):
    (found,) = ledger.sent.values()
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("kind", "call", "sent"),
    [
        ("all-gather", lambda part, whole: dist.all_gather_into_tensor(whole, part), 15 * 400),
        ("reduce-scatter", lambda part, whole: dist.reduce_scatter_tensor(part, whole), 15 * 400),
        ("all-reduce", lambda part, whole: dist.all_reduce(whole), 2 * 15 * 400),
    ],
)
def test_rings_send_what_the_others_lack_and_leave_a_node_once(ledger, kind, call, sent):
    call(torch.empty(100), torch.empty(1600))
    found = entry(ledger)
    assert (found.kind, found.ranks, found.nodes, found.calls) == (kind, 16, 2, 1)
    assert found.bytes == pytest.approx(sent)
    assert found.outside == pytest.approx(sent / 8)


def test_uneven_messages_are_counted_by_where_they_go(ledger):
    sends = [10 + rank for rank in range(16)]
    all_to_all(torch.empty(sum(sends), 3), sends, [10] * 16, dist.group.WORLD)
    found = entry(ledger)
    assert found.kind == "all-to-all"
    assert found.bytes == 12 * sum(sends[1:])
    assert found.outside == 12 * sum(sends[8:])


def test_groups_within_a_node_send_nothing_outside(ledger):
    dist.all_reduce(torch.empty(64), group=dist.new_group(range(4)))
    found = entry(ledger)
    assert (found.ranks, found.nodes, found.outside) == (4, 1, 0)
    assert found.bytes == pytest.approx(2 * 3 / 4 * 256)


def test_storages_count_from_creation_to_death_and_views_do_not(ledger):
    def live():
        return sum(change for _, change in ledger.events)

    x = torch.empty(1000)
    y = x[:10].view(5, 2)
    assert live() == 4000
    z = x + 1
    assert live() == 8000
    z.untyped_storage().resize_(0)
    assert live() == 4000
    z.untyped_storage().resize_(4000)
    del x
    assert live() == 8000  # y still holds it
    del y, z
    assert live() == 0


def test_a_second_group_is_refused():
    with cluster(8), pytest.raises(RuntimeError, match="there is one already"), cluster(8):
        pass


def test_counting_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    cases = [scaling.ScalingCase(ulysses=8), scaling.ScalingCase(shard=8), scaling.ScalingCase(shard=2, ulysses=8)]
    monkeypatch.setattr(scaling, "cases", lambda: iter(cases))
    done = []

    def row(case):
        done.append(case)
        if len(done) == 2:
            raise KeyboardInterrupt
        return asdict(case)

    monkeypatch.setattr(scaling, "row", row)
    path = tmp_path / "scaling.json"
    with pytest.raises(KeyboardInterrupt):
        scaling.run(path, "")
    scaling.run(path, "")
    assert done == [cases[0], cases[1], cases[1], cases[2]]
    found = json.loads(path.read_text())
    assert [scaling.case_of(r) for r in found["rows"]] == cases
    assert found["versions"]["torch"] == torch.__version__


def test_two_runs_keep_the_counts_of_each_other(tmp_path, monkeypatch):
    cases = [scaling.ScalingCase(ulysses=8), scaling.ScalingCase(shard=8)]
    monkeypatch.setattr(scaling, "cases", lambda: iter(cases))
    path = tmp_path / "scaling.json"

    def row(case):  # while one counts the first case, another run counts the second
        if case == cases[0]:
            scaling.run(path, str(cases[1]))
        return asdict(case)

    monkeypatch.setattr(scaling, "row", row)
    scaling.run(path, str(cases[0]))
    assert [scaling.case_of(r) for r in json.loads(path.read_text())["rows"]] == cases


def test_the_table_has_a_line_per_count(tmp_path):
    document = tmp_path / "page.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    rows = {
        **asdict(scaling.ScalingCase(replicate=2, ulysses=8)),
        "sent": [
            {"kind": "all-gather", "bytes": 3e9, "outside": 0.0},
            {"kind": "all-reduce", "bytes": 2e9, "outside": 2e9},
        ],
        "peak": {"parameters": 8_000_000_000, "working": 1_500_000_000},
    }
    results = tmp_path / "scaling.json"
    results.write_text(json.dumps({"versions": {"torch": "2.x"}, "commit": "abc", "rows": [rows]}))
    assert scaling.main(["--out", str(results), "--report", str(document)]) == 0
    lines = document.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    (line,) = (line for line in lines if line.startswith("| 16 |"))
    assert line.startswith("| 16 | 2 x 1 x 1 x 8 | 48 | 1 | full | adamw | 3.0 | 0.0 | 2.0 | 0.0 | 2.0 | 9.5 |")
