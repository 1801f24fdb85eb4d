"""The processor's arithmetic peaks, which kernels are measured against."""

import pytest

from mgt_kernels import _C, cpu

PEAKS = [
    (isa, dtype)
    for isa, dtype in [
        ("avx2", "float32"),
        ("avx2", "int8"),
        ("avx512", "float32"),
        ("avx512", "int8"),
        ("avx512_vnni", "int8"),
        ("avx512_bf16", "bfloat16"),
        ("amx", "int8"),
        ("amx", "bfloat16"),
    ]
    if isa in cpu.available_isas()
]


def best(isa: str, dtype: str, num_threads: int = 1) -> float:
    # the best of several, because other work on the machine can only lower it
    return max(_C.peak(isa, dtype, num_threads, 0.02) for _ in range(10))


@pytest.mark.parametrize("peak", PEAKS, ids="-".join)
def test_a_peak_is_plausible(peak):
    one, two = best(*peak), best(*peak, num_threads=2)
    # a core multiplies a register at least every other nanosecond, and no core reaches 100 tera-operations
    assert 4e9 < one < 1e14
    assert 0.7 * one < two < 3 * one


@pytest.mark.parametrize(
    "faster, slower, ratio",
    [
        (("avx512_vnni", "int8"), ("avx512", "float32"), 1.5),
        (("avx2", "int8"), ("avx2", "float32"), 1.5),
        (("amx", "int8"), ("avx512_vnni", "int8"), 1.5),
        (("amx", "bfloat16"), ("avx512", "float32"), 1.5),
        (("amx", "int8"), ("amx", "bfloat16"), 1.2),
    ],
)
def test_shorter_types_are_faster(faster, slower, ratio):
    if not {faster, slower} <= set(PEAKS):
        pytest.skip(f"needs the instruction sets {faster[0]} and {slower[0]}")
    assert best(*faster) > ratio * best(*slower)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("sse", "float32", 1, 0.01), "isa: sse has no peak"),
        (("scalar", "float32", 1, 0.01), "isa: scalar has no peak"),
        (("avx2", "float64", 1, 0.01), "dtype: avx2 has no peak of float64"),
        (("avx2", "float32", 0, 0.01), "num_threads: expected 1 or more"),
        (("avx2", "float32", 1, 0.0), "seconds: expected more than 0"),
        (("avx2", "float32", 1, float("nan")), "seconds: expected more than 0"),
    ],
)
def test_what_there_is_no_peak_of_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        _C.peak(*arguments)
