"""The static lower bounds: their arithmetic by hand, the table, and what is aimed at."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import roofline
import triton
from configurations import CONFIGURATIONS, compile_for
from gpus import GPUS, Gpu, Occupancy
from roofline import Row, Work
from sass import Pipe

A100, H100, RTX4090 = GPUS
# one multiprocessor at 1 GHz: a clock is a nanosecond
SMALL = replace(A100, multiprocessors=1, clock_ghz=1.0, dram_gb_per_s=1.0)


def work(instructions: float = 0, lsu_words: float = 0, int8_macs: float = 0, **pipes: float) -> Work:
    counts = {pipe: pipes.get(pipe.name, 0.0) for pipe in Pipe}
    return Work(instructions, counts, lsu_words, int8_macs, 0)


def nanoseconds(work: Work, gpu: Gpu = SMALL, num_ctas: int = 1, num_warps: int = 4) -> dict[str, float]:
    return {name: 1e3 * t for name, t in roofline.times(work, num_ctas, num_warps, 100, gpu).items()}


def test_times_by_hand() -> None:
    # one warp on each scheduler
    found = nanoseconds(work(instructions=100, lsu_words=10, int8_macs=4096, FMA=20, IMAD=10, ALU=30, XU=5))
    assert found["memory"] == pytest.approx(100)
    assert found["issue"] == pytest.approx(100)
    # 16 lanes of a scheduler: two clocks for an instruction
    assert found["fma"] == pytest.approx(60) and found["alu"] == pytest.approx(60)
    # four lanes: eight clocks
    assert found["xu"] == pytest.approx(40)
    # 32 lanes for the four warps
    assert found["lsu"] == pytest.approx(40)
    assert found["tensor"] == pytest.approx(4 * 4096 / 2048)


def test_integer_multiplies_have_half_of_the_lanes_from_8_9_on() -> None:
    ada = replace(SMALL, capability=89)
    assert nanoseconds(work(FMA=20, IMAD=10), ada)["fma"] == pytest.approx(30)
    assert nanoseconds(work(FMA=5, IMAD=20), ada)["fma"] == pytest.approx(40)


def test_warps_are_whole() -> None:
    # five warps on four schedulers: one of them has two
    assert nanoseconds(work(instructions=10), num_ctas=5, num_warps=1)["issue"] == pytest.approx(20)
    assert nanoseconds(work(lsu_words=10), num_ctas=5, num_warps=1)["lsu"] == pytest.approx(50)


def test_published_peaks() -> None:
    # TFLOPS of float32 and dense TOPS of int8 on the data sheets
    for gpu, tflops, tops in ((A100, 19.5, 624), (RTX4090, 82.6, 660.6)):
        assert 2e-3 * gpu.multiprocessors * gpu.clock_ghz * gpu.rates[Pipe.FMA] == pytest.approx(tflops, rel=0.01)
        assert 2e-3 * gpu.multiprocessors * gpu.clock_ghz * gpu.int8_macs == pytest.approx(tops, rel=0.01)
    assert 2e-3 * H100.multiprocessors * H100.clock_ghz * H100.rates[Pipe.FMA] == pytest.approx(67, rel=0.01)


def make_row(issue: float, reason: str) -> Row:
    return Row("kernel, case", "GPU", {"memory": 1.0, "issue": issue, "tensor": 0.5}, Occupancy(1, 4, "warps"), reason)


def test_a_bound_above_memory_needs_a_reason() -> None:
    assert make_row(1.6, "").ratio == pytest.approx(1.6) and make_row(1.6, "").bound == "issue"
    roofline.check_reasons([make_row(1.5, ""), make_row(1.6, "because")])
    with pytest.raises(ValueError, match=r"kernel, case, GPU: .* 1.60x the memory time \(issue\).* no reason"):
        roofline.check_reasons([make_row(1.6, "")])


def test_update_replaces_what_is_between_the_comments(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text(f"before\n{roofline.BEGIN}\nold\n{roofline.END}\nafter\n")
    roofline.update(page, "new")
    assert page.read_text() == f"before\n{roofline.BEGIN}\nnew\n{roofline.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="expected <!-- roofline -->"):
        roofline.update(page, "new")


def test_table_of_the_kernels(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("every_architecture"):
        pytest.skip("takes half a minute to compile for sm_89; --every-architecture runs it")
    rows = roofline.rows()
    num_cases = sum(len(configuration.cases) for configuration in CONFIGURATIONS)
    assert len(rows) == num_cases * len(GPUS)
    table = roofline.markdown(rows)
    assert sum(line.startswith("| ") for line in table.splitlines()) == len(rows) + 1
    for word in ("measured", "speed"):
        assert word not in table
    if triton.__version__ == roofline.TRITON:
        page = Path(__file__).parents[2] / "docs" / "gpu.md"
        assert f"{roofline.BEGIN}\n{table}\n{roofline.END}" in page.read_text(), "roofline.py --update docs/gpu.md"


@pytest.mark.parametrize(
    ("gpu", "most"), [(A100, 2.0), (H100, 2.0), (RTX4090, 1.2)], ids=lambda x: getattr(x, "name", x)
)
def test_guided_draw_is_near_the_memory_time(gpu: Gpu, most: float) -> None:
    configuration = next(x for x in CONFIGURATIONS if x.name == "bf16 guided")
    row = roofline.row_of(compile_for(configuration, gpu.capability)[0], gpu)
    assert row.ratio <= most, f"{row.name}, {row.gpu}: {row.ratio:.2f}x the memory time ({row.bound})"
