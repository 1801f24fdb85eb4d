"""Random draws on the device: csrc/philox.h, elementary.h and noise.h once more, operation for operation.

Every product that meets a sum is an explicit fma, and the kernels are compiled with LAUNCH_OPTIONS, so that
the draws have the same bits as on the CPU. Nothing here may use a hardware approximation (tl.log, tl.exp,
tl.sqrt, a division).
"""

import triton
import triton.language as tl

# contracting a product with a sum that the CPU rounds twice would change the draws
LAUNCH_OPTIONS = {"enable_fp_fusion": False}

STREAM_TOKEN = tl.constexpr(0)
STREAM_NOISE = tl.constexpr(1)
STREAM_CONFIDENCE = tl.constexpr(2)
STREAM_MERGE = tl.constexpr(4)

# column c takes word (c // 512) % 4 of block (c // 2048) * 512 + c % 512
WORD_WIDTH = tl.constexpr(512)

_PHILOX_ROUNDS = tl.constexpr(7)
_PHILOX_MUL0 = tl.constexpr(0xD2511F53)
_PHILOX_MUL1 = tl.constexpr(0xCD9E8D57)
_PHILOX_KEY0 = tl.constexpr(0x9E3779B9)
_PHILOX_KEY1 = tl.constexpr(0xBB67AE85)

_LN2 = tl.constexpr(0.693147182464599609375)
_LOG2_E = tl.constexpr(1.44269502162933349609375)
_TWO_POW_MINUS_32 = tl.constexpr(2.0**-32)
_TWO_POW_MINUS_33 = tl.constexpr(2.0**-33)


@triton.jit
def philox(seed, block, position, step, stream: tl.constexpr):
    """Compute the four words of Philox4x32-7; block and position are uint32 and broadcast."""
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    c0 = block
    c1 = position
    c2 = step.to(tl.uint32)
    c3 = tl.full([], stream, tl.uint32)
    # unrolled: in the first rounds half of the state is not yet as wide as the blocks
    for _ in tl.static_range(_PHILOX_ROUNDS):
        # one wide multiplication gives both halves
        product0 = c0.to(tl.uint64) * _PHILOX_MUL0
        product1 = c2.to(tl.uint64) * _PHILOX_MUL1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = product0.to(tl.uint32)
        key0 = key0 + _PHILOX_KEY0
        key1 = key1 + _PHILOX_KEY1
    return c0, c1, c2, c3


@triton.jit
def block_of(column):
    """Compute the block whose word (column // 512) % 4 a column takes."""
    return (column // (4 * WORD_WIDTH) * WORD_WIDTH + column % WORD_WIDTH).to(tl.uint32)


@triton.jit
def _log1p_polynomial(r):
    p = tl.fma(r, -0.04507484659552574, 0.10463026165962219)
    p = tl.fma(p, r, -0.13161194324493408)
    p = tl.fma(p, r, 0.14478394389152527)
    p = tl.fma(p, r, -0.1664731204509735)
    p = tl.fma(p, r, 0.19990861415863037)
    p = tl.fma(p, r, -0.2500009536743164)
    p = tl.fma(p, r, 0.3333345055580139)
    p = tl.fma(p, r, -0.5)
    return tl.fma(r * r, p, r)


@triton.jit
def _split_exponent(x):
    # x = 2^e (1 + r), r in [-1/4, 1/2)
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F400000) >> 23
    return exponent.to(tl.float32), (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def log_f32(x):
    """Compute log(x) of normal x > 0."""
    e, r = _split_exponent(x)
    return tl.fma(e, _LN2, _log1p_polynomial(r))


@triton.jit
def exp_nonpositive(d):
    """Compute exp(d) of d <= 0; below -87 it stays at exp(-87)."""
    d = tl.maximum(d, -87.0)
    # adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa
    shifted = tl.fma(d, _LOG2_E, 12582912.0)
    r = tl.fma(d, _LOG2_E, 12582912.0 - shifted)
    p = tl.fma(r, 0.0013264729641377926, 0.009671512991189957)
    p = tl.fma(p, r, 0.05550733581185341)
    p = tl.fma(p, r, 0.24022242426872253)
    p = tl.fma(p, r, 0.6931470036506653)
    p = tl.fma(p, r, 1.0)
    return (p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def uniform(word):
    """Compute w = (word + 1/2) 2^-32; small words keep all their bits."""
    return tl.fma(word.to(tl.float32), _TWO_POW_MINUS_32, _TWO_POW_MINUS_33)


@triton.jit
def gumbel(word):
    """Compute g = -log(-log1p(-w)) of w = (word + 1/2) 2^-32."""
    w = uniform(word)
    # log1p(-w): directly for w < 1/4, through 1 - w (exact from the complement of the word) above
    e, r = _split_exponent(uniform(word ^ 0xFFFFFFFF))
    direct = w < 0.25
    e = tl.where(direct, 0.0, e)
    r = tl.where(direct, 0.0 - w, r)
    log1p = tl.fma(e, _LN2, _log1p_polynomial(r))
    return 0.0 - log_f32(0.0 - log1p)


@triton.jit
def exponential_below(word):
    """Compute w + w^2/2 + w^3/3, w = word 2^-32, plus 2^-33: below E = -log1p(-(w + 2^-33)), but for rounding."""
    x = word.to(tl.float32)
    p = tl.fma(x, 2.0**-96 / 3, 2.0**-65)
    p = tl.fma(p, x, 2.0**-32)
    return tl.fma(p, x, 2.0**-33)


@triton.jit
def log2_approx(x):
    """Compute log2(x) of normal x > 0 by the hardware's approximation: 2^-22 relative, or absolute near 1."""
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _rsqrt_approx(x):
    return tl.inline_asm_elementwise(
        "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _sqrt_f32(x):
    """Compute sqrt(x) of x = 0 or normal x > 0, correctly rounded: what sqrt.rn does, without its branch."""
    # a bound that only x = 0, of either sign, meets: 0 * inf would be NaN
    r = tl.minimum(_rsqrt_approx(tl.abs(x)), 2.0**63)
    s = x * r
    return tl.fma(tl.fma(-s, s, x), 0.5 * r, s)


@triton.jit
def gaussian_pair(word_radius, word_angle):
    """Compute two independent N(0, 1) values by Box-Muller."""
    radius = _sqrt_f32(-2.0 * log_f32(uniform(word_radius)))
    # angle = 2 pi word / 2^32 = quadrant pi/2 + x, |x| <= pi/4, split in integers and so without rounding
    shifted = word_angle + 0x20000000
    x = ((shifted & 0x3FFFFFFF) - 0x20000000).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-9
    x2 = x * x
    sine = tl.fma(x2, -0.00019515282474458218, 0.00833216030150652)
    sine = tl.fma(sine, x2, -0.16666655242443085)
    sine = tl.fma(sine * x2, x, x)
    cosine = tl.fma(x2, 2.44331567955669e-05, -0.0013887316454201937)
    cosine = tl.fma(cosine, x2, 0.04166664555668831)
    cosine = tl.fma(cosine, x2, -0.5)
    cosine = tl.fma(cosine, x2, 1.0)
    # quadrants 1 and 3 exchange sine and cosine; the sign bits follow the quadrant
    odd = (shifted & 0x40000000) != 0
    first = tl.where(odd, sine, cosine).to(tl.uint32, bitcast=True) ^ ((shifted + 0x40000000) & 0x80000000)
    second = tl.where(odd, cosine, sine).to(tl.uint32, bitcast=True) ^ (shifted & 0x80000000)
    return radius * first.to(tl.float32, bitcast=True), radius * second.to(tl.float32, bitcast=True)
