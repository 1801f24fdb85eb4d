"""Random draws: known answers, equality of all paths, and their distributions."""

import math

import pytest
import torch
from scipy import stats

from mgt_kernels import cpu, reference

# Random123 1.14, kat_vectors: philox4x32 with 7 rounds: counter (4 words), key (2 words), answer
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


def as_seed(key):
    seed = key[1] << 32 | key[0]
    return seed - (1 << 64) if seed >= 1 << 63 else seed


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_philox_known_answers(isa, counter, key, answer):
    block, position, step, stream = counter
    words = cpu.philox(as_seed(key), position, step, stream, block, 1, isa)
    assert tuple(words[:, 0].tolist()) == answer
    oracle = reference.philox(
        torch.tensor([as_seed(key)]), torch.tensor([block]), torch.tensor([position]), step, stream
    )
    assert tuple(int(word) for word in oracle) == answer


def test_philox_blocks_are_the_oracles(isa):
    words = cpu.philox(-77, 5, 9, 1, 3, 1001, isa).to(torch.int64)
    oracle = reference.philox(torch.tensor([-77]), torch.arange(3, 1004), torch.tensor([5]), 9, 1)
    assert torch.equal(words, torch.stack(oracle))


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 511, 512, 513, 1025, 1537, 2048, 2049, 5000])
def test_gaussian_is_the_oracles(isa, num_tokens):
    noise = cpu.gaussian(5, 7, 3, num_tokens, isa)
    oracle = reference.gaussian(torch.tensor([5]), 8, num_tokens, 3)[0, 7]
    # Box-Muller in fp32: a few units in the last place of a radius of at most 6.8
    assert (noise.double() - oracle).abs().max() < 3e-6
    assert torch.equal(noise, cpu.gaussian(5, 7, 3, num_tokens, "scalar"))


def test_gaussian_law():
    draws = torch.cat([cpu.gaussian(seed, 0, 0, 10**6) for seed in range(10)]).double()
    n = len(draws)
    # standard errors of the first four moments of n normal draws
    for power, moment, error in [
        (1, 0, 1),
        (2, 1, math.sqrt(2)),
        (3, 0, math.sqrt(15)),
        (4, 3, math.sqrt(96)),
    ]:
        assert abs(float((draws**power).mean()) - moment) < 4 * error / math.sqrt(n)
    distance = stats.kstest(draws.numpy(), "norm").statistic
    assert distance < stats.kstwobign.ppf(0.999) / math.sqrt(n)


def test_gaussian_tails():
    num_draws, limits = 0, (4.0, 4.5, 5.0, 5.5)
    hits = dict.fromkeys(limits, 0)
    for seed in range(24):
        draws = cpu.gaussian(seed, 1, 2, 2**24).abs_()
        num_draws += len(draws)
        largest = draws[draws > 4.0]
        for limit in limits:
            hits[limit] += int((largest > limit).sum())
    for limit in limits:
        expected = num_draws * 2 * stats.norm.sf(limit)
        assert stats.poisson.cdf(hits[limit], expected) > 1e-4, (limit, hits[limit], expected)
        assert stats.poisson.sf(hits[limit] - 1, expected) > 1e-4, (limit, hits[limit], expected)


def test_streams_positions_steps_and_seeds_differ():
    base = cpu.philox(1, 2, 3, 0, 0, 64)
    for other in [(2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1)]:
        assert (cpu.philox(*other, 0, 64) == base).float().mean() < 0.02
