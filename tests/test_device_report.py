"""The report of a run on a GPU: from made-up lines, from files that were cut off, and what it says is missing."""

import json
import re

import pytest

from mgt_benchmarks import device_report
from mgt_benchmarks.run import OURS

BYTES, OPERATIONS = 134_000_000, 2 * 1101 * 1024 * 4096


def timing(workload, contestant, us, operations=0, part="timings", **facts):
    name = workload if part == "ceilings" else f"{workload} [{contestant}]"
    arithmetic = "bf16 product" if operations else ""
    return {
        "part": part, "name": name, "status": "ok", "workload": workload, "contestant": contestant, "bytes": BYTES,
        "operations": operations, "arithmetic": arithmetic, "copies": 2, "us": us, "us_low": us, "us_high": us * 1.1,
        "host_us": 20.0, "how": "graph", "seconds": 0.3,
    } | facts  # fmt: skip


def begun(part, *names):
    return {"part": part, "name": "", "status": "begun", "names": names}


def ended(part):
    return {"part": part, "name": "", "status": "ended", "seconds": 1.0}


LINES = [
    begun("environment", "card", "nvcc"),
    {"part": "environment", "name": "card", "status": "ok", "value": "a card <of> none"},
    {"part": "environment", "name": "nvcc", "status": "absent", "why": "nvcc is not on the PATH"},
    ended("environment"),
    begun("ceilings", "copy", "read", "bf16 product"),
    timing("copy", "card", 50.0, part="ceilings"),
    timing("read", "card", 45.0, part="ceilings"),
    timing("bf16 product", "card", 1400.0, 2 * 8192**3, part="ceilings"),
    ended("ceilings"),
    begun("timings", f"sample_tokens, bf16 [{OURS}]", "sample_tokens, bf16 [PyTorch]", "step [a]", "linear [b]"),
    timing("sample_tokens, bf16", OURS, 60.0),
    timing("sample_tokens, bf16", "PyTorch", 600.0, how="calls"),
    timing("linear, M=16 K=1024 N=4096", "w4a8_linear", 6.0, OPERATIONS // 64),
    timing("linear, M=1101 K=1024 N=4096", "w4a8_linear", 20.0, OPERATIONS),
    timing("linear, M=1101 K=1024 N=4096", "torch.mm bf16", 18.0, OPERATIONS, bytes=13_000_000),
    begun("correctness", "case a", "case b", "case c"),
    {"part": "correctness", "name": "case a", "status": "ok", "seconds": 0.1},
    {"part": "correctness", "name": "case b", "status": "failed", "why": "AssertionError: 3 | token ids\ndiffer"},
    {"part": "sanitizer", "name": "", "status": "absent", "why": "compute-sanitizer is not on the PATH"},
    ended("sanitizer"),
]


def written(path, lines=LINES):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["device_report", *map(str, arguments)])
    device_report.main()


def test_figures_are_those_of_the_lines(tmp_path):
    results = device_report.read(written(tmp_path / "results.jsonl"))
    rows = {(row[0], row[1]): row[2:] for row in device_report.rows(results)}
    # 134 MB in 60 us are 2233 GB/s, 50 of these 60 us are a copy's
    us, host_us = "60", "20"
    assert rows["sample_tokens, bf16", OURS] == [us, "60 to 66", host_us, "1", "2233 GB/s", "0.83", "graph"]
    assert rows["sample_tokens, bf16", "PyTorch"][3] == "10"
    speed = device_report.short(OPERATIONS / 18e-6 / 1e12)
    # 1400 us for 8192^3 leave 11.8 us for this product, more than a copy of its bytes takes
    product = rows["linear, M=1101 K=1024 N=4096", "torch.mm bf16"]
    assert product[3:6] == ["0.9", f"{speed} TFLOP/s", "0.65"]


def test_what_is_missing_is_named(tmp_path):
    results = device_report.read(written(tmp_path / "results.jsonl"))
    said = device_report.text(results)
    for remark in (
        "| timings | step [a] | missing: no result was written |",
        "| correctness | case c | missing: no result was written |",
        "| correctness | case b | failed: AssertionError: 3 / token ids differ |",
        "| environment | nvcc | absent: nvcc is not on the PATH |",
        "| sanitizer |  | absent: compute-sanitizer is not on the PATH |",
        "| repeats |  | not begun |",
        "| correctness | 1 | 1 | 0 | 1 | cut off |",
        "1 items failed, crashed or timed out.",
    ):
        assert remark in said, remark
    assert "not complete: build, precompile, timings, correctness" in said.lower()


def test_a_page_has_plots_and_needs_no_network(tmp_path, monkeypatch, capsys):
    run(monkeypatch, written(tmp_path / "results.jsonl"))
    page = (tmp_path / "device.html").read_text()
    assert page.count("<svg") == 3 and "a card &lt;of&gt; none" in page and "case c" in page
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)", page.replace('xlink:href="#', "")) and "<script" not in page
    assert str(tmp_path / "device.html") in capsys.readouterr().out


def test_a_file_that_was_cut_off_anywhere_renders(tmp_path, monkeypatch):
    # every plot and every state, at a price
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **options: file.write("<svg"))
    whole = written(tmp_path / "whole").read_bytes()
    ends = [position for position, byte in enumerate(whole) if byte == ord("\n")]
    for end in (*ends[::2], *(end - 7 for end in ends[1::3])):
        (tmp_path / "results.jsonl").write_bytes(whole[:end])
        run(monkeypatch, tmp_path / "results.jsonl")
        results = device_report.read(tmp_path / "results.jsonl")
        assert results.num_unreadable == (end not in ends)
        assert len(results.items) <= whole[:end].count(b"\n") + 1
        assert ("could not be read" in device_report.text(results)) == (end not in ends)


def test_the_later_result_of_an_item_counts(tmp_path):
    again = timing("sample_tokens, bf16", OURS, 55.0)
    results = device_report.read(written(tmp_path / "results.jsonl", [*LINES, begun("timings", again["name"]), again]))
    assert [row[2] for row in device_report.rows(results) if row[:2] == ["sample_tokens, bf16", OURS]] == ["55"]


def test_a_rehearsal_says_so_first(tmp_path):
    lines = [line | {"rehearsed": True} for line in LINES if "us" not in line]
    said = device_report.text(device_report.read(written(tmp_path / "results.jsonl", lines)))
    assert said.startswith("Rehearsed without a GPU: nothing here was measured.") and "GB/s" not in said


@pytest.mark.parametrize("content", ["", "no line\n", '{"part": "timings"}\n'])
def test_a_file_of_something_else_is_refused(content, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, path)
    assert (
        ended.value.code == 2 and "expected lines that tests/gpu/device.sh wrote, got none" in capsys.readouterr().err
    )


def test_without_the_packages_of_the_page_the_tables_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    monkeypatch.delitem(__import__("sys").modules, "mgt_benchmarks.page", raising=False)
    run(monkeypatch, written(tmp_path / "results.jsonl"))
    said = capsys.readouterr()
    assert "2233 GB/s" in said.out and said.err.startswith("no page:") and not (tmp_path / "device.html").exists()
