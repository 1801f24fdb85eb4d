"""What runs on a GPU, rehearsed without one: every part, a run that is killed, items that crash, and the clock."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recorder
import torch
from cases import CASES
from triton import knobs

from mgt_benchmarks import device_report
from mgt_benchmarks.run import OURS
from mgt_sampler import graphs, sampling

with pytest.MonkeyPatch.context() as rehearsing:
    rehearsing.setenv("DEVICE_REHEARSAL", "1")
    from device import (
        build,
        clock,
        correctness,
        environment,
        extras,
        precompile,
        repeats,
        results,
        sanitizer,
        timetable,
        timings,
        workloads,
    )

GPU = Path(__file__).parent
SANITIZER = """#!/bin/sh
[ "$1 $2 $3 $4" = "--tool memcheck --error-exitcode 99" ] && echo "========= ERROR SUMMARY: ${FOUND:-0} errors"
exit "${FOUND:-0}"
"""


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    (folder / "compute-sanitizer").write_text(SANITIZER)
    (folder / "compute-sanitizer").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def start(out, tools, *parts):
    folders = {"OUT": str(out), "SCRATCH": str(out / "scratch"), "TRITON_CACHE_DIR": str(knobs.cache.dir)}
    variables = folders | {"PYTHON": sys.executable, "PATH": tools}
    command = ["bash", str(GPU / "device.sh"), "--rehearse", *parts]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=os.environ | variables, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def killed_at(num_lines, out, tools, *parts):
    """Kill a run, and all that it started, once the file has so many lines; return what is in it then."""
    process, path = start(out, tools, *parts), out / "results.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < num_lines:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return path.read_bytes()


def test_a_rehearsal_that_was_killed_twice_comes_to_its_end(tmp_path, tools):
    # one test, as it is dear: killed in the first part, killed among the timings, a line cut off, and then whole
    written = [killed_at(2, tmp_path, tools), killed_at(60, tmp_path, tools, "timings")]
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b'{"part": "timings", "na')
    process = start(tmp_path, tools)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    for part_of_it, state in zip(written, ("not begun", "cut off"), strict=True):
        check_whole_lines(part_of_it, state, tmp_path / "cut_off.jsonl")
    check_complete(device_report.read(tmp_path / "results.jsonl"))
    check_nothing_looks_measured(tmp_path)
    assert "Rehearsed without a GPU: nothing here was measured." in said


def check_whole_lines(written, state, path):
    assert written.endswith(b"\n") and all(json.loads(line)["rehearsed"] for line in written.splitlines())
    path.write_bytes(written)
    found = device_report.read(path)
    assert found.state("correctness") == "not begun" and found.state("timings") == state
    missing = found.missing("timings")
    assert bool(missing) == (state == "cut off")
    if missing:
        assert f"| timings | {missing[-1]} | missing" in device_report.text(found)


def check_complete(found):
    assert found.num_unreadable == 1
    states = {part: found.state(part) for part in device_report.PARTS}
    if "absent" in states["second ptxas"]:
        del states["second ptxas"]
    assert set(states.values()) == {"ended"}, states
    assert not any(found.missing(part) for part in device_report.PARTS)
    bad = [line for line in found.items.values() if line["status"] not in ("ok", "absent")]
    assert not bad, bad
    checked = [line for line in found.of("correctness") if line["status"] == "ok"]
    assert {line["name"].split(":")[0] for line in checked} == {case.op for case in CASES}
    assert found.of("sanitizer") and found.of("exported") and found.of("repeats")


def check_nothing_looks_measured(out):
    for text in (out / "results.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            assert line["rehearsed"] and not line.keys() & {"us", "host_us", "seconds"}
    page = (out / "device.html").read_text()
    assert "nothing here was measured" in page and "GB/s" not in page


def test_without_a_device_nothing_is_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["timetable"])
    monkeypatch.setattr(timetable, "REHEARSED", False)
    monkeypatch.setattr(timetable.CONTEXT, "set_forkserver_preload", lambda modules: None)
    begun = []
    monkeypatch.setattr(timetable, "run", lambda part: begun.append(part.name) or {"card": "absent"})
    with pytest.raises(SystemExit, match="expected a CUDA device, and a build of PyTorch that sees it"):
        timetable.main()
    assert begun == ["environment"]


def test_a_failure_is_the_status_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["timetable", "repeats"])
    monkeypatch.setattr(timetable.CONTEXT, "set_forkserver_preload", lambda modules: None)
    monkeypatch.setattr(timetable, "run", lambda part: {"an item": "crashed", "a tool": "absent"})
    with pytest.raises(SystemExit, match="2 items failed, crashed or timed out"):
        timetable.main()


def test_the_report_knows_the_parts_of_the_timetable():
    assert device_report.PARTS == ("build", *(part.name for part in timetable.PARTS))


ITEMS = """
import os, signal, time
from device.results import AbsentError

def names():
    if os.environ.get("LACKING"): raise AbsentError("no such tool")
    return ["good", "wrong", "absent", "broken", "killed", "hanging", "last"]

def work(name):
    print("in", name, flush=True)
    if name == "wrong": assert False, "2 differ"
    if name == "absent": raise AbsentError("not here")
    if name == "broken": raise RuntimeError("illegal access")
    if name == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if name == "hanging": time.sleep(60)
    return {"process": os.getpid()}
"""


def ran(tmp_path, lacking="", **options):
    """The lines of a part whose items end in every way."""
    (tmp_path / "items.py").write_text(ITEMS)
    program = f"from device.isolation import Part, run; run(Part('a part', 'items', **{options}))"
    path = os.pathsep.join((str(GPU), str(tmp_path)))
    variables = {name: value for name, value in os.environ.items() if name != "DEVICE_REHEARSAL"}
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        env=variables | {"OUT": str(tmp_path), "PYTHONPATH": path, "LACKING": lacking},
    )
    return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]


def test_what_breaks_an_item_does_not_break_the_next(tmp_path):
    begun, *lines = ran(tmp_path, seconds=30, item_seconds=3)
    assert begun["status"] == "begun" and begun["names"] == [line["name"] for line in lines]
    statuses = [line["status"] for line in lines]
    assert statuses == ["ok", "failed", "absent", "failed", "crashed", "timed out", "ok"]
    assert lines[1]["why"] == "AssertionError: 2 differ" and lines[3]["why"] == "RuntimeError: illegal access"
    assert lines[0]["process"] != lines[-1]["process"] and lines[5]["seconds"] >= 3
    assert "in hanging" in (tmp_path / "log.txt").read_text()


def test_processes_share_the_items(tmp_path):
    lines = ran(tmp_path, seconds=4, item_seconds=60, processes=3)
    assert lines[0]["status"] == "begun" or sorted(line["status"] for line in lines)[1] == "begun"
    found = {line["name"]: line["status"] for line in lines if line["name"]}
    # the second process has "wrong" and "killed", the third "absent" and "hanging" until the part's time is over
    assert found["killed"] == "crashed" and found["hanging"] == "timed out" and found["last"] == "ok"


def test_a_part_that_cannot_begin_says_why(tmp_path):
    (line,) = ran(tmp_path, lacking="a tool", seconds=30)
    assert line["status"] == "absent" and line["why"] == "no such tool" and not line["name"]


def test_a_case_that_is_wrong_is_found(monkeypatch):
    name = correctness.REHEARSED_CASES[1]
    right = correctness.case_of(name)
    wrong = dataclasses.replace(right, expected=lambda *arguments: (right.expected(*arguments)[0] + 1,))
    monkeypatch.setattr(correctness, "CASES", [wrong])
    with pytest.raises(AssertionError):
        correctness.work(name)
    torch.use_deterministic_algorithms(True)


def test_moving_keeps_strides_that_are_not_dense():
    (case,) = [case for case in CASES if case.name == "w4a8 fp32, groups of 32"]
    x = case.make_arguments()[0]
    (moved, number) = correctness.to("cpu", (x, 3))
    assert moved.stride() == x.stride() != x.contiguous().stride() and torch.equal(moved, x) and number == 3
    assert moved.untyped_storage().nbytes() == x.untyped_storage().nbytes() and moved.data_ptr() != x.data_ptr()


def test_what_the_sanitizer_finds_fails(tools, monkeypatch):
    monkeypatch.setenv("PATH", tools)
    assert sanitizer.work("memcheck, a case") == {}
    monkeypatch.setenv("FOUND", "99")
    with pytest.raises(AssertionError, match="exit code 99: ========= ERROR SUMMARY: 99 errors"):
        sanitizer.work("memcheck, a case")


def test_what_a_build_lacks_is_said_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build.importlib.metadata, "version", lambda name: "65.5" if name == "setuptools" else "2.13.6")
    monkeypatch.setattr(build, "_is_installed", lambda: False)
    monkeypatch.setattr(build.sys, "executable", str(tmp_path / "python"))
    assert not build.build()
    first = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    wanted = "building needs setuptools >= 77 (65.5 is here) and cmake and ninja and a C++ compiler (c++)"
    assert first["status"] == "failed" and first["why"].startswith(wanted) and wanted in capsys.readouterr().out


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    results.append("timings", "first", "ok")
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b'{"part": "timings", "na')
    results.append("timings", "second", "ok")
    found = device_report.read(tmp_path / "results.jsonl")
    assert [name for _, name in found.items] == ["first", "second"] and found.num_unreadable == 1


def test_public_ops_are_compiled_ahead_as_the_timings_call_them(monkeypatch):
    for module in (precompile, workloads):
        monkeypatch.setattr(module, "REHEARSED", False)
    monkeypatch.setattr(precompile, "capability", lambda: 80)
    name = f"mask_by_confidence, B=1 N=256 [{OURS}]"
    assert {name, *map(str, CASES)} < set(precompile.names())
    assert precompile.work(name) == {"launches": 1}


def test_cases_that_only_a_gpu_runs_are_there():
    named = {*repeats._NAMES, *sanitizer._NAMES}
    assert named <= set(map(str, CASES))
    # every kernel is in one of them
    assert {name.split(":")[0] for name in named} == {case.op for case in CASES}


def test_generations_in_graphs_are_compared(monkeypatch):
    monkeypatch.setattr(sampling, "check_graphs", lambda device: None)
    monkeypatch.setattr(graphs, "capture", recorder.capture)
    extras.generations_in_graphs("cpu")
    # a graph that keeps the first step's guidance
    monkeypatch.setattr(graphs.GraphedSteps, "_value", lambda self, name: getattr(self._schedules, name)[0])
    with pytest.raises(AssertionError, match="tokens differ"):
        extras.generations_in_graphs("cpu")


def test_every_workload_has_a_name_of_its_own(monkeypatch):
    monkeypatch.setattr(workloads, "REHEARSED", False)
    found = workloads.timed()
    assert len({workload.item for workload in found}) == len(found) > 90
    # ours comes first, so that the others' times are over it
    first = {}
    for workload in found:
        first.setdefault(workload.name, workload.contestant)
    assert set(first.values()) == {OURS, "w4a8_linear"}


class FakeCuda:
    """A GPU on which a call takes 10 us, by its own clock."""

    def __init__(self):
        self.now, self.captured = 0.0, None
        # the names of torch.cuda
        self.Event, self.CUDAGraph = lambda enable_timing: FakeEvent(self), lambda: FakeGraph(self)

    def call(self):
        if self.captured is None:
            self.now += 10e-3
        else:
            self.captured.num_calls += 1

    @contextlib.contextmanager
    def graph(self, graph):
        self.captured = graph
        yield
        self.captured = None

    def synchronize(self):
        assert self.captured is None

    def get_device_properties(self, index):
        return type("Card", (), {"L2_cache_size": 50 * 2**20})

    def mem_get_info(self):
        return 80 * 2**30, 80 * 2**30


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = self.cuda.now

    def synchronize(self):
        self.cuda.synchronize()

    def elapsed_time(self, end):
        return end.at - self.at


class FakeGraph:
    def __init__(self, cuda):
        self.cuda, self.num_calls = cuda, 0

    def replay(self):
        # in a graph nobody waits for the host
        self.cuda.now += self.num_calls * 4e-3


@pytest.mark.parametrize(("captured", "how", "us"), [(True, "graph", 4.0), (False, "calls", 10.0)])
def test_a_call_takes_what_the_events_say(captured, how, us, monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(clock, "REHEARSED", False)
    monkeypatch.setattr(clock.torch, "cuda", cuda)
    times = clock.measure([cuda.call] * 3, captured)
    assert times["how"] == how and times["host_us"] > 0
    assert times["us"] == times["us_low"] == times["us_high"] == pytest.approx(us)


@pytest.mark.parametrize(("num_bytes", "copies"), [(134 * 10**6, 2), (8 * 10**6, 14), (10**3, 32), (15 * 10**9, 1)])
def test_inputs_are_twice_the_cache(num_bytes, copies, monkeypatch):
    monkeypatch.setattr(timings, "REHEARSED", False)
    monkeypatch.setattr(timings.torch, "cuda", FakeCuda())
    assert timings.num_copies(num_bytes) == copies


def test_programs_that_are_not_there_are_absent():
    with pytest.raises(results.AbsentError, match="no-such-program is not on the PATH"):
        environment.printed("no-such-program")
    with pytest.raises(results.AbsentError, match="false fails"):
        environment.printed("false")
