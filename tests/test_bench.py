"""The suite: its gate, its arithmetic on known times, its files, what it says of two runs, and the command."""

import csv
import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from mgt_benchmarks import cases, comparison, instructions, machine, page, report, samplers, suite, tables
from mgt_benchmarks.case import AbsentError, Call, Case, Job, Setting, Target, Work
from mgt_benchmarks.models import Layer, Model
from mgt_benchmarks.run import OURS, Result, allocated_bytes, time_case
from mgt_benchmarks.steps import compiled, gather_peers, sampling_case
from mgt_kernels.info import OPS
from mgt_sampler.cli import app
from mgt_sampler.files import write_csv

SMALL = Model("small", 9, 64, 3.0)
WORK = Work(bytes_moved=1000, num_positions=10)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(machine, "BANDWIDTH_BYTES", 2**20)
    machine._parts.cache_clear()
    yield
    machine._parts.cache_clear()


def nothing():
    pass


def case_of(*, targets=(), axis=None, work=WORK, **job):
    def prepare():
        return Job(work, **{"ours": Call(nothing), "peers": {"peer": Call(nothing)}, "check": nothing} | job)

    return Case(Setting("op", "", "model", "B=1"), prepare, targets, curve=axis)


def result_of(ours=(2.0, 2.0, 2.0), peer=(4.0, 6.0, 8.0), extra_bytes=0, peak=(), work=WORK, skipped=(), **options):
    seconds = {OURS: list(ours), "peer": list(peer)}
    return Result(case_of(**options), work, dict(skipped), seconds, [500.0] * 3, list(peak), extra_bytes)


@pytest.mark.parametrize("scale", ["quick", "standard", "full"])
def test_every_case_has_a_name_of_its_own(scale):
    names = [case.setting.name for case in cases.cases_of(scale, 2)]
    assert len(names) == len(set(names)) > 15


def test_the_quick_cases_have_every_op_and_the_full_ones_everything():
    ops = {case.setting.op for case in cases.cases_of("quick", 2)}
    assert ops >= {*OPS, "remask_tokens", "step", "alternation"}
    full = [case.setting for case in cases.cases_of("full", 2)]
    draws = [setting for setting in full if setting.op == "sample_tokens"]
    assert {setting.dtype for setting in draws} == {torch.float32, torch.bfloat16, torch.float16}
    assert {setting.layout for setting in draws} == {"token-major", "position-major"}
    assert {setting.threads for setting in full} == {1, 2}
    for name in ("aMUSEd 256", "Meissonic 1024", "MaskGIT 512", "Muse 256", "LLaDA", "Show-o 256"):
        assert name in {setting.model for setting in draws}, name


@pytest.mark.parametrize("layout", ["token-major", "position-major"])
@pytest.mark.parametrize("op", ["step", "sample_tokens", "mask_by_confidence"])
def test_a_case_runs_against_its_peers(op, layout):
    peers = ("pytorch", "diffusers")
    result = time_case(sampling_case(SMALL, op=op, layout=layout, noise_scale=1.0, peers=peers, threads=1), rounds=2)
    assert set(result.seconds) == {OURS, *peers}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in (*result.seconds.values(), result.bandwidth))


@pytest.mark.parametrize("case", cases.cases_of("standard", 2), ids=lambda case: case.setting.name)
def test_every_target_names_a_peer_that_the_case_asks_for(case):
    # the sampling cases' peers are in their closure, and the others' are seen when they run
    for target in case.targets:
        assert target.peer in ("", *cases.CHAINS, "ours", "ours fp32", "ours all masked", "one read", "alone",
                               "torch fp32", "its model calls")  # fmt: skip


def test_every_op_of_the_suite_runs_on_small_shapes():
    timed = [
        cases.differential_case(SMALL, threads=1),
        cases.remask_case(SMALL, threads=1),
        cases.commit_case(SMALL, threads=1),
        cases.scheduler_case(SMALL, threads=1),
        cases.merging_case("match_tokens", side=6, num_channels=8, threads=1),
        cases.merging_case("merge_tokens", side=6, num_channels=8, dtype=torch.bfloat16, threads=1),
        cases.z_sampling_case(batch=1, threads=1),
        cases.linear_case(Layer("small", 5, 64, 32), op="w4a8_linear", group_size=32, threads=1),
        cases.linear_case(Layer("small", 5, 64, 32), op="w4a16_linear", dtype=torch.bfloat16, group_size=32, threads=1),
    ]
    for case in timed:
        result = time_case(case, rounds=1)
        assert result.seconds[OURS][0] > 0 and len(result.seconds) > 1, case.setting.name
        has_peak = ("w4a8_linear", "w4a16_linear", "match_tokens")
        assert bool(result.peak) == (case.setting.op in has_peak)


SAMPLERS = list(cases.sampler_cases(1, small=True))


@pytest.mark.parametrize("case", SAMPLERS, ids=lambda case: case.setting.name)
def test_samplers_run_against_their_peers(case):
    pytest.importorskip("diffusers.schedulers.scheduling_entropy_bound")
    pytest.importorskip("transformers.models.diffusion_gemma")
    assert time_case(case, rounds=1).ratios
    for full in cases.sampler_cases(2):
        if full.setting.variant == case.setting.variant and full.setting.model == case.setting.model:
            job = case.prepare()
            assert {target.peer for target in full.targets} <= {*job.peers, *job.skipped}


@pytest.mark.parametrize("case", SAMPLERS, ids=lambda case: case.setting.name)
def test_samplers_that_do_something_else_are_not_timed(case, monkeypatch):
    job = case.prepare()
    job.check()

    def altered(op, change):
        original = getattr(samplers.mgt_kernels, op)
        return lambda *args, **options: original(*args, **change(options))

    def hotter(options):
        return options | ({"temperature": 1.1 * options["temperature"]} if options.get("temperature") else {})

    def more(options):
        bounds = {"entropy_bound": 20, "threshold": 20, "count": 2}
        return options | {name: options[name] * factor for name, factor in bounds.items() if name in options}

    changes = [("commit_tokens", more)] if case.setting.op == "draw and commit" else []
    if case.setting.model != "OmniVoice":
        changes.append(("sample_tokens", hotter))
    for op, change in changes:
        with monkeypatch.context() as patched:
            patched.setattr(samplers.mgt_kernels, op, altered(op, change))
            with pytest.raises(AssertionError):
                job.check()
    if "top" in case.setting.variant:
        wrong = {"pytorch": lambda x, truncation: samplers.sorted_filter(x, truncation._replace(top_k=1))}
        monkeypatch.setattr(samplers, "FILTERS", wrong)
        with pytest.raises(AssertionError, match="other tokens are left than by pytorch"):
            job.check()


def test_what_is_no_peer_of_a_sampler_is_absent(monkeypatch):
    def missing(name):
        raise AbsentError(f"No module named {name!r}")

    monkeypatch.setattr(samplers, "require", missing)
    skipped = next(case for case in SAMPLERS if "entropy bound" in case.setting.name).prepare().skipped
    assert set(skipped) == {"diffusers", "transformers"}


def test_alternatives_of_a_text_select():
    names = [case.setting.name for case in suite.select("full", ["SDAR|OmniVoice", "draw"], threads=2)]
    assert len(names) == 3 and {name.split(", ")[2] for name in names} == {"SDAR", "OmniVoice"}


def test_tables_are_put_into_the_pages(tmp_path):
    docs, folder = tmp_path / "docs", tmp_path / "run"
    (docs / "benchmarks").mkdir(parents=True)
    for name in ("benchmarks", "frameworks"):
        (docs / f"{name}.md").write_text("before\n<!-- samplers -->\nold\n<!-- /samplers -->\nafter\n")
    with (docs / "frameworks.md").open("a") as file:
        file.write("<!-- llada2 -->\n<!-- /llada2 -->\n")
    result = result_of()
    step = replace(result.case, setting=replace(result.case.setting, op="draw and commit"))
    steps = replace(result, case=step, seconds={OURS: [1.0] * 3, "diffusers": [2.0] * 3, "pytorch": [3.0] * 3})
    results = [result, steps]
    suite.write(folder, [row for one in results for row in report.rows(one)], results, {"processor": "this"})
    (folder / "llada2.md").write_text("torch 2\n\n| case |\n| --- |\n| step |\n")
    for _ in range(2):
        tables.fill(folder, docs)
        shown = {name: (docs / f"{name}.md").read_text() for name in ("benchmarks", "frameworks")}
        assert all(
            text.startswith("before\n<!-- samplers -->\n`processor this`\n\n| case |") for text in shown.values()
        )
        assert shown["benchmarks"].count("pytorch") == 1 and "pytorch" not in shown["frameworks"]
        assert shown["frameworks"].count("| diffusers | 2 |") == 1
        assert tables.between(shown["frameworks"], "llada2").startswith("`torch 2`\n\n| case |")
        assert tables.between(shown["benchmarks"], "samplers").count("| case |") == 1
    with pytest.raises(ValueError, match="expected <!-- samplers --> and"):
        tables.filled("nothing", "samplers", "")


def test_what_computes_something_else_is_not_timed(monkeypatch):
    calls = []

    def wrong():
        raise AssertionError("token ids differ")

    with pytest.raises(AssertionError, match="token ids differ"):
        time_case(case_of(check=wrong, ours=Call(lambda: calls.append(1))), rounds=1)
    assert not calls
    # the check of a step sees an op that draws other tokens
    from mgt_benchmarks import steps

    draw = steps.mgt_kernels.sample_tokens
    job = sampling_case(SMALL, threads=1).prepare()
    job.check()
    monkeypatch.setattr(
        steps.mgt_kernels, "sample_tokens", lambda *args, **options: draw(*args, **options | {"seed": 1})
    )
    with pytest.raises(AssertionError, match="differ"):
        job.check()


def test_peers_that_are_absent_are_rows_with_a_reason():
    def absent():
        raise AbsentError("not installed (pip install it)")

    peers, skipped = gather_peers({"one": lambda: Call(nothing), "two": absent})
    assert set(peers) == {"one"} and skipped == {"two": "not installed (pip install it)"}
    result = time_case(case_of(peers=peers, skipped=skipped), rounds=1)
    rows = report.rows(result)
    assert [row["contestant"] for row in rows] == [OURS, "one", "two"]
    assert rows[2]["skipped"] == "not installed (pip install it)" and not rows[2]["median_ms"]
    assert "skipped: not installed (pip install it)" in report.cells(rows[2])


def test_a_chain_that_does_not_compile_is_absent(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with pytest.raises(AbsentError, match=r"^RuntimeError: no C\+\+ compiler$"):
        compiled(nothing)


def test_before_a_call_is_not_timed():
    calls = []
    Call(lambda: calls.append("timed"), before=lambda: calls.append("before")).seconds()
    assert calls == ["before", "timed"]


def test_ratios_and_shares_of_known_times():
    result = result_of()
    ratio = result.ratios["peer"]
    assert (ratio.low, ratio.median, ratio.high) == (2.5, 3.0, 3.5)
    # 1000 bytes at 500 bytes per second
    assert result.roofline[OURS].median == 1.0 and result.roofline["peer"].median == pytest.approx(1 / 3)
    slower_arithmetic = result_of(work=replace(WORK, operations=100), peak=(10.0, 10.0, 10.0))
    assert slower_arithmetic.roofline[OURS].median == 5.0
    first, second = report.rows(result, instructions_per_element=5.25)
    assert (first["median_ms"], second["ratio"], first["instructions_per_element"]) == ("2000", "3", "5.25")
    assert tuple(first) == tuple(second) == report.FIELDS


def test_targets_that_are_missed_are_named():
    targets = (Target(3.0, "peer"), Target(2000.0))
    assert not result_of(targets=targets, extra_bytes=640).missed
    assert result_of(targets=(Target(3.1, "peer"),)).missed == [">= 3.1x peer"]
    assert result_of(targets=(Target(1.0),)).missed == ["<= 1 ms"]
    assert result_of(extra_bytes=641).missed == ["<= 64 B/position"]
    # nothing to hold it to where the peer is absent
    assert not result_of(targets=(Target(3.1, "absent"),)).missed


def test_memory_is_counted():
    assert 4000 <= allocated_bytes(Call(lambda: torch.empty(1000))) < 5000
    assert allocated_bytes(Call(nothing)) == 0


def test_the_files_hold_what_was_measured(tmp_path):
    results = [result_of(), result_of(axis=("N", 64))]
    results = [
        results[0],
        replace(results[1], case=replace(results[1].case, setting=replace(results[1].case.setting, model="over N"))),
    ]
    table = [row for result in results for row in report.rows(result)]
    suite.write(tmp_path, table, results, {"processor": "a <b>"})
    assert report.read_csv(tmp_path / "results.csv") == table
    document = json.loads((tmp_path / "results.json").read_text())
    assert [one["stats"]["median"] for one in document["benchmarks"]] == [2.0, 6.0] * 2
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == 3 and "a &lt;b&gt;" in html
    # opens without a network: nothing is fetched
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)", html.replace('xlink:href="#', ""))
    assert "<script" not in html and "@import" not in html


def test_pytest_benchmark_compares_the_json(tmp_path):
    report.write_json(tmp_path / "one.json", [result_of()], {"processor": "this"})
    report.write_json(tmp_path / "two.json", [result_of(ours=(1.0, 1.0, 1.0))], {"processor": "this"})
    command = [sys.executable, "-m", "pytest_benchmark", "compare", "one.json", "two.json"]
    command += ["--group-by=name", "--columns=median,rounds"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if f"[{OURS}] (" in line]
    assert [line[-3:] for line in lines] == [["1.0000", "(1.0)", "3"], ["2.0000", "(2.00)", "3"]]


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "results.csv"
    with path.open("w") as file:
        csv.writer(file).writerow(["case", "ms"])
    with pytest.raises(ValueError, match=r"expected the columns of a results\.csv of mgt bench, got"):
        report.read_csv(path)


def rows_of(shares, **fields):
    low, median, high = shares
    names = ("roofline_share_q1", "roofline_share", "roofline_share_q3")
    row = dict.fromkeys(report.FIELDS, "") | dict(zip(names, map(str, shares), strict=True))
    assert low <= median <= high
    return [row | {"case": "a", "contestant": OURS, "rounds": "9", "instructions_per_element": "5"} | fields]


@pytest.mark.parametrize(
    "old, new, verdict",
    [
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), ""),
        ((0.5, 0.5, 0.5), (0.54, 0.54, 0.54), ""),
        ((0.5, 0.5, 0.5), (0.6, 0.6, 0.6), "faster"),
        ((0.5, 0.5, 0.5), (0.4, 0.4, 0.4), "slower"),
        # as far apart, but each run strayed as far
        ((0.4, 0.5, 0.6), (0.5, 0.6, 0.7), ""),
    ],
)
def test_what_moved_is_told_from_noise(old, new, verdict):
    found = comparison.compare(rows_of(old), rows_of(new, instructions_per_element="6"))
    (change,) = found.changes
    assert change.verdict == verdict and not found.alone and change.instructions == pytest.approx(1.2)


def test_a_slower_machine_is_no_change():
    def run(ours, *peers):
        return [
            row
            for i, share in enumerate((ours, *peers))
            for row in rows_of([share] * 3, contestant=f"peer {i}" if i else OURS)
        ]

    found = comparison.compare(run(0.5, 0.2, 0.3, 0.4), run(0.4, 0.16, 0.24, 0.32))
    assert found.drift == pytest.approx(0.8) and not any(change.moved for change in found.changes)
    ours, *_ = comparison.compare(run(0.5, 0.2, 0.3, 0.4), run(0.3, 0.16, 0.24, 0.32)).changes
    assert (ours.contestant, ours.verdict, ours.faster) == (OURS, "slower", pytest.approx(0.75))


def test_what_is_in_one_run_alone_is_named(capsys):
    found = comparison.compare(rows_of((1, 1, 1)), rows_of((1, 1, 1), contestant="peer"))
    assert not found.changes and found.alone == ["mgt-kernels of a", "peer of a"]
    comparison.print_comparison(found)
    printed = capsys.readouterr().out
    assert "0 of 0 moved" in printed and "in one of the two runs alone: peer of a" in printed


def test_markdown_has_a_row_for_each_ratio():
    table = report.rows(result_of(targets=(Target(4.0, "peer"),)))
    *_, last = report.markdown(table).splitlines()
    assert (
        last
        == "| op, model, B=1, fp32, 2 threads | peer | 3 | 2.5 to 3.5 | 1 | >= 4x peer, <= 64 B/position | >= 4x peer |"
    )


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "standard_cases", lambda threads: iter([sampling_case(SMALL, threads=threads)]))
    monkeypatch.setattr(instructions, "count", lambda *_: ({}, {}))
    run = CliRunner().invoke
    assert "step, guided, small" in run(app, ["bench", "--list"]).output
    done = run(app, ["bench", "--only", "step", "--rounds", "2", "--out", str(tmp_path / "a"), "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert "step, guided, small, B=1 N=9 V=64, fp32, 1 thread" in done.output
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "ratios.svg", "report.html", "results.csv", "results.json", "roofline.svg"
    ]  # fmt: skip
    same = run(app, ["bench", "--compare", str(tmp_path / "a"), str(tmp_path / "a" / "results.csv")])
    assert same.exit_code == 0 and "0 of 2 moved beyond the noise" in same.output
    monkeypatch.setattr(Target, "met", lambda *_: False)
    monkeypatch.setattr(
        cases, "standard_cases", lambda threads: iter([sampling_case(SMALL, threads=1, targets=(Target(1.0),))])
    )
    assert run(app, ["bench", "--rounds", "1", "--no-progress"]).exit_code == 1
    for arguments, message in (
        (["--only", "nothing has this name"], "expected a part of a case's name"),
        (["--quick", "--full"], "expected without --full"),
        (["--compare", str(tmp_path), str(tmp_path)], "No such file"),
    ):
        done = run(app, ["bench", *arguments])
        assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output


def test_shares_of_a_machine():
    assert machine.read_bandwidth() > 0
    facts = machine.describe()
    assert facts["PyTorch"] == torch.__version__ and all(facts.values())


def test_the_colours_and_markers_of_contestants_differ():
    names = [OURS, *(f"peer {i}" for i in range(15))]
    looks = page.looks(names)
    assert len(set(looks.values())) == len(names)


def test_the_contestants_begin_in_turn():
    order = []

    class Timed:
        def __init__(self, name):
            self.name = name

        def seconds(self):
            order.append(self.name)
            return 1.0

    peers = {name: Timed(name) for name in ("first peer", "second peer")}
    result = time_case(case_of(ours=Timed(OURS), peers=peers), rounds=4)
    # two calls of each to warm up, the rounds, and one that counts memory
    rounds = [order[6 + 3 * i : 9 + 3 * i] for i in range(4)]
    assert [each[0] for each in rounds] == [OURS, "first peer", "second peer", OURS]
    assert all(sorted(each) == sorted([OURS, *peers]) for each in rounds)
    assert list(result.seconds) == [OURS, *peers] and all(len(each) == 4 for each in result.seconds.values())


def test_the_files_of_a_full_disk_are_the_old_ones(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    names = ["results.csv", "results.json", "report.html"]
    for name in names:
        (tmp_path / name).write_text("old")
    table = report.rows(result_of())
    writers = (
        lambda: write_csv(tmp_path / "results.csv", report.FIELDS, table),
        lambda: report.write_json(tmp_path / "results.json", [result_of()], {}),
        lambda: page.write_page(tmp_path, table, {}),
    )
    monkeypatch.setattr(os, "fsync", full)
    for write in writers:
        with pytest.raises(OSError, match="No space"):
            write()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert all((tmp_path / name).read_text() == "old" for name in names)
