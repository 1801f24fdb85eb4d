"""Other packages' own calls before `accelerate` and after it: what is timed, what is refused, and the table."""

import importlib
import math

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers.schedulers.scheduling_block_refinement")
pytest.importorskip("transformers")

import typer

from mgt_benchmarks import client_cases, clients, machine, report, tables
from mgt_benchmarks.case import AbsentError, Call, Target, Work
from mgt_benchmarks.run import OURS, Result, time_case
from mgt_kernels.ops import Sampled

SMALL = list(client_cases.client_cases(1, small=True))
FULL = list(client_cases.client_cases(2))
# where each draws
DRAWS = {
    "AmusedPipeline": "mgt_sampler.draw",
    "LLaDA2Pipeline": "mgt_sampler.clients.llada2",
    "MaskGit": "mgt_sampler.clients.muse",
    "OmniVoice": "mgt_sampler.clients.omnivoice",
}
every_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.setting.name)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(machine, "BANDWIDTH_BYTES", 2**20)
    machine._parts.cache_clear()
    yield
    machine._parts.cache_clear()


def prepared(case):
    try:
        return case.prepare()
    except AbsentError as reason:
        pytest.skip(str(reason))


def test_the_shapes_and_the_targets_are_the_clients_own():
    names = [case.setting.name for case in FULL]
    assert len(set(names)) == len(names) == len(SMALL) == 11
    assert [case.setting.op for case in FULL] == [case.setting.op for case in SMALL]
    assert {case.setting.op for case in FULL} == set(client_cases.PACKAGES) == set(DRAWS)
    shapes = {case.setting.shape for case in FULL}
    assert shapes == {
        "B=1 N=4096 V=8192", "B=1 N=256 V=8192", "B=1 N=32 V=157184", "B=1 N=256 V=65536", "B=8 N=250 V=1025"
    }  # fmt: skip
    for case in FULL:
        greedy = case.setting.variant.endswith("temperature 0")
        assert case.targets == (Target(5 if greedy else 40, client_cases.PACKAGES[case.setting.op]),)
    assert not any(case.targets for case in SMALL)


@every_case
def test_a_call_is_timed_before_and_after(case):
    prepared(case)
    result = time_case(case, rounds=1)
    package = client_cases.PACKAGES[case.setting.op]
    assert set(result.seconds) == {OURS, package} and set(result.ratios) == {package} and not result.missed
    assert all(seconds[0] > 0 for seconds in result.seconds.values())


@every_case
def test_both_sides_are_what_they_are_named_after(case):
    job = prepared(case)
    ours, theirs = (call.run.args[0] for call in (job.ours, *job.peers.values()))
    modules = [getattr(one, "func", one) for one in (ours, theirs)]
    modules = [one.__module__ if hasattr(one, "__name__") else type(one).__module__ for one in modules]
    assert modules[0].startswith("mgt_sampler.") and not modules[1].startswith("mgt_")


def changed(drawn):
    # scores move too, for of what is greedy they may be all that is checked
    tokens = torch.where(drawn.logprob == math.inf, drawn.token_ids, (drawn.token_ids + 1) % 8)
    fields = drawn._asdict() | {"token_ids": tokens, "logprob": drawn.logprob - 0.1}
    return Sampled(**fields | ({} if drawn.argmax is None else {"argmax": tokens}))


@every_case
def test_what_draws_something_else_is_not_timed(case, monkeypatch):
    job = prepared(case)
    job.check()
    module = importlib.import_module(DRAWS[case.setting.op])
    draw = module.sample_tokens
    monkeypatch.setattr(module, "sample_tokens", lambda *args, **options: changed(draw(*args, **options)))
    with pytest.raises(AssertionError, match="tokens differ"):
        job.check()


@pytest.mark.parametrize("case", [case for case in SMALL if case.setting.op in ("AmusedPipeline", "MaskGit")],
                         ids=lambda case: case.setting.name)  # fmt: skip
def test_what_masks_other_numbers_is_not_timed(case, monkeypatch):
    job = prepared(case)
    ours = job.ours.run.args[0]
    if case.setting.op == "MaskGit":
        schedule = ours.args[0].noise_schedule
        original = ours.func
        module = importlib.import_module(original.__module__)

        def altered(model, *args, **options):
            monkeypatch.setattr(model, "noise_schedule", lambda time: schedule(time) * 0.5)
            return original(model, *args, **options)

        monkeypatch.setattr(module, "generate", altered)
        job = prepared(case)
    else:
        ours.config["masking_schedule"] = "linear"
    with pytest.raises(AssertionError, match="positions are masked"):
        job.check()


def test_truncation_and_scores_are_compared(monkeypatch):
    from mgt_sampler.clients import llada2

    case = next(case for case in SMALL if "top_k" in case.setting.variant)
    job = prepared(case)
    draw = llada2.sample_tokens
    with monkeypatch.context() as patched:

        def narrower(*args, **options):
            return draw(*args, **options | ({"top_p": 0.5} if options["top_p"] < 1 else {}))

        patched.setattr(llada2, "sample_tokens", narrower)
        with pytest.raises(AssertionError, match="other probabilities than before"):
            job.check()
    job = prepared(next(case for case in SMALL if case.setting.op == "OmniVoice"))
    omnivoice = importlib.import_module("mgt_sampler.clients.omnivoice")
    score = omnivoice.sample_tokens

    def altered(*args, **options):
        drawn = score(*args, **options)
        return drawn._replace(max_logprob=drawn.max_logprob - 0.1)

    monkeypatch.setattr(omnivoice, "sample_tokens", altered)
    with pytest.raises(AssertionError, match="the scores differ"):
        job.check()


def test_a_step_is_the_mean_of_a_calls(monkeypatch):
    monkeypatch.setattr(Call, "seconds", lambda self: 9.0)
    assert client_cases.PerStep(lambda: None, num_steps=18).seconds() == 0.5


def test_logits_are_in_memory_as_the_networks_leave_them():
    def logits_of(op):
        job = prepared(next(case for case in SMALL if case.setting.op == op))
        call = job.ours.run
        return next(x for x in call.func.__defaults__ if isinstance(x, (torch.Tensor, tuple)))

    amused = logits_of("AmusedPipeline")
    assert amused.shape == (1, 128, 8, 8) and amused.is_contiguous(memory_format=torch.channels_last)
    # of 50 tokens of text and 20 frames, with 2 codebooks of 65
    for half in logits_of("OmniVoice"):
        assert half.shape == (1, 2, 20, 65) and half.stride()[1:] == (65, 130, 1)
        assert half.untyped_storage().nbytes() == 4 * 70 * 130


def test_an_absent_package_is_a_row_with_its_name(monkeypatch):
    def missing(*_):
        raise ImportError("No module named 'omnivoice'")

    def absent(name):
        raise AbsentError(f"No module named {name!r}")

    monkeypatch.setattr(client_cases, "omnivoice_module", missing)
    monkeypatch.setattr(client_cases, "muse_package", missing)
    monkeypatch.setattr(client_cases, "require", absent)
    table = clients.time_cases(SMALL, rounds=1)
    assert [row["contestant"] for row in table] == [client_cases.PACKAGES[case.setting.op] for case in SMALL]
    assert tuple(table[0]) == report.FIELDS
    *_, last = clients.markdown(table).splitlines()
    assert last.startswith("| OmniVoice of omnivoice | _predict")
    assert "| absent: No module named 'omnivoice' (make build/clients/installed) |" in last
    assert {line.count("|") for line in clients.markdown(table).splitlines()} == {len(clients.COLUMNS) + 1}


def test_a_package_that_nobody_has_is_not_found():
    from mgt_benchmarks.client_packages import find_package

    with pytest.raises(ImportError, match="No module named 'nobody_has_this'"):
        find_package("nobody_has_this")


@pytest.mark.parametrize("before, met", [(50.0, "yes"), (30.0, "no")])
def test_the_table_says_whether_the_target_is_met(before, met):
    case = next(case for case in FULL if case.setting.op == "MaskGit")
    seconds = {OURS: [0.001] * 3, "muse-maskgit-pytorch": [before / 1000, before / 1000, before / 500]}
    result = Result(case, Work(1, 1), {}, seconds, [1.0] * 3, [], 0)
    *_, line = clients.markdown(report.rows(result)).splitlines()
    assert line.startswith("| MaskGit of muse-maskgit-pytorch | generate, a step of 18 ")
    assert line.endswith(f" | fp32 | {before:g} | 1 | {before:g} | {before:g} to {1.5 * before:g} | >= 40 | {met} |")


def command(*arguments):
    app = typer.Typer()
    app.command()(clients.main)
    return CliRunner().invoke(app, [*arguments])


def test_the_command_writes_a_file_and_fills_the_page(tmp_path, monkeypatch):
    prepared(next(case for case in SMALL if case.setting.op == "MaskGit"))
    some = [case for case in SMALL if case.setting.op in ("AmusedPipeline", "MaskGit")]
    monkeypatch.setattr(clients, "client_cases", lambda threads, small=False: some)
    path, page = tmp_path / "clients.csv", tmp_path / "page.md"
    done = command("--quick", "--rounds", "1", "--out", str(path))
    assert done.exit_code == 0, done.output
    table = report.read_csv(path)
    assert len(table) == 2 * len(some) and clients.markdown(table) in done.output
    page.write_text("before\n<!-- clients -->\nold\n<!-- /clients -->\nafter\n")
    done = command("--rounds", "1", "--threads", "1", "--page", str(page), "--out", str(path))
    assert done.exit_code == 0, done.output
    facts, _, shown = tables.between(page.read_text(), "clients").partition("\n\n")
    assert "PyTorch" in facts and "diffusers" in facts and "muse-maskgit-pytorch" in facts
    assert shown == clients.markdown(report.read_csv(path))


def test_bad_arguments_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(clients, "client_cases", lambda *_, **__: pytest.fail("before the arguments are checked"))
    page = tmp_path / "page.md"
    page.write_text("no marks")
    for arguments, message in (
        (["--quick", "--page", str(page)], "expected without --quick"),
        (["--page", str(page)], "expected <!-- clients -->"),
        (["--page", str(tmp_path / "none.md")], "No such file"),
        (["--out", str(tmp_path / "none" / "clients.csv")], "expected a path in a folder that exists"),
    ):
        done = command(*arguments)
        # the terminal's frame may break a line anywhere
        assert done.exit_code == 2 and message.replace(" ", "") in "".join(done.output.replace("│", "").split())
