"""The C ABI itself, through ctypes: what it refuses, what it does not depend on, and what it leaves as it was."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import mgt_kernels

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
LIBRARY = ctypes.CDLL(str(mgt_kernels.library_path()))
LIBM = ctypes.CDLL("libm.so.6")
ISAS = mgt_kernels.info()["isas"]
NAMES = ("auto", "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
OK, INVALID, UNAVAILABLE, BAD_LOGITS, BAD_TOKEN = range(5)
BIG = 2**62
POOL = ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def structure(name, **fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


I64, I32, U32, F32, POINTER = ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32, ctypes.c_float, ctypes.c_void_p
Context = structure("Context", isa=I32, num_threads=I32, parallel=POINTER)
Logits = structure("Logits", data=POINTER, stride_sample=I64, stride_position=I64, stride_token=I64)
Draw = structure(
    "Draw", struct_size=U32, dtype=I32, num_samples=I64, num_positions=I64, num_tokens=I64, logits=Logits,
    uncond_logits=Logits, second_uncond_logits=Logits, tokens=POINTER, seeds=POINTER, first_positions=POINTER,
    guidance_scales=POINTER, second_guidance_scales=POINTER, token_bias=POINTER, mask_token_id=I64, step=I64,
    guidance_scale=F32, noise_scale=F32, temperature=F32, rows=I32, second_guidance_scale=F32, guidance=I32,
    softcap=F32, logprob_of=I32, top_k=I64, top_p=F32, min_p=F32,
)  # fmt: skip
Drawn = structure(
    "Drawn", struct_size=U32, token_ids=POINTER, logprob=POINTER, argmax=POINTER, max_logprob=POINTER,
    margin=POINTER, entropy=POINTER, logsumexp=POINTER, known_logprob=POINTER, logit=POINTER,
)  # fmt: skip
Differential = structure(
    "Differential", struct_size=U32, variant=I32, sample=ctypes.POINTER(Draw), aliased_history=I32,
    has_history=I32, share=ctypes.c_double,
)  # fmt: skip
Mask = structure(
    "Mask", struct_size=U32, temperature=F32, num_samples=I64, num_positions=I64, token_ids=POINTER, logprob=POINTER,
    mask_len=POINTER, seeds=POINTER, mask_token_id=I64, step=I64,
)  # fmt: skip
Commit = structure(
    "Commit", struct_size=U32, rule=I32, num_samples=I64, num_positions=I64, token_ids=POINTER, score=POINTER,
    tokens=POINTER, counts=POINTER, starts=POINTER, ends=POINTER, seeds=POINTER, mask_token_id=I64, step=I64, value=F32,
    temperature=F32, argmax=POINTER, max_logprob=POINTER, known_logprob=POINTER, replace_above=F32, mask_below=F32,
)  # fmt: skip
Committed = structure("Committed", struct_size=U32, tokens=POINTER, done=POINTER)
Layer = structure(
    "Layer", struct_size=U32, dtype=I32, num_rows=I64, num_inputs=I64, num_outputs=I64, x=POINTER, x_stride=I64,
    w_q=POINTER, scale=POINTER, zero_point=POINTER, bias=POINTER, group_size=I64, scale_dtype=I32,
)  # fmt: skip
Tokens = structure(
    "Tokens", struct_size=U32, dtype=I32, num_samples=I64, height=I64, width=I64, num_channels=I64, x=POINTER,
    stride_sample=I64, stride_token=I64, num_merged=I64, seeds=POINTER, step=I64, threshold=F32,
)  # fmt: skip
Matched = structure("Matched", struct_size=U32, rows=POINTER, members=POINTER, starts=POINTER, num_rows=POINTER)
SHAPE = dict(
    struct_size=U32, dtype=I32, num_samples=I64, num_tokens=I64, num_rows=I64, num_channels=I64, x=POINTER,
    stride_sample=I64, stride_token=I64,
)  # fmt: skip
Merge = structure("Merge", **SHAPE, members=POINTER, starts=POINTER)
Unmerge = structure("Unmerge", **SHAPE, rows=POINTER)
for query in ("sample_tokens", "differential_sample", "w4a8_linear", "w4a16_linear", "match_tokens"):
    getattr(LIBRARY, f"mgt_{query}_workspace").restype = I64


def context(isa="auto", num_threads=1, pool=None):
    return Context(NAMES.index(isa), num_threads, ctypes.cast(pool, POINTER) if pool else None)


def pointer(tensor):
    return POINTER(tensor.data_ptr())


class Call:
    """An op with its arguments, in tensors that live as long; `changes` are set on its structures."""

    def __init__(self, op, **changes):
        generator = torch.Generator().manual_seed(3)
        self.op, self.kept, self.outputs, self.extra = op, [], [], []
        if op in ("sample_tokens", "differential_sample"):
            shape = 2, 37, 70
            logits = torch.randn(3, *shape, generator=generator)
            # the order of denormals decides a greedy draw
            logits[:, :, 5] = -torch.rand(3, 2, 70, generator=generator) * 1e-39
            tokens, seeds = torch.full(shape[:2], 70), torch.tensor([5, -6])
            halves = [Logits(half.data_ptr(), *half.stride()) for half in logits]
            firsts, scales, bias = torch.tensor([0, 9]), torch.tensor([2.0, 1.5]), torch.zeros(70)
            bias[[3, 69]] = -torch.inf
            self.kept = [logits, tokens, seeds, firsts, scales, scales.flip(0), bias]
            self.sample = self.args = Draw(
                ctypes.sizeof(Draw), 0, *shape, *halves, *(t.data_ptr() for t in self.kept[1:]), 70, 3, 2.0, 0.5, 1.0,
                0, 0.5, 0, 5.0,
            )  # fmt: skip
            if op == "sample_tokens":
                self.sample.top_k, self.sample.top_p, self.sample.min_p = 60, 0.99, 1e-3
            self.outputs = [torch.zeros(2, 37, dtype=torch.int64), torch.zeros(2, 37)]
            if op == "differential_sample":
                self.args = Differential(ctypes.sizeof(Differential), 0, ctypes.pointer(self.sample), 0, 0, 0.75)
                state = [torch.zeros(shape, dtype=torch.uint16), torch.zeros(2, 37, dtype=torch.uint8)]
                self.outputs = [*state, *self.outputs, torch.zeros(2, 37)]
            else:
                self.outputs += [torch.zeros(2, 37, dtype=torch.int64), *torch.zeros(6, 2, 37)]
                self.drawn = Drawn(ctypes.sizeof(Drawn), *(t.data_ptr() for t in self.outputs))
        elif op == "mask_by_confidence":
            logprob = -torch.rand(2, 37, generator=generator) * 1e-39
            token_ids, mask_len, seeds = torch.arange(74).view(2, 37), torch.tensor([9, 20]), torch.tensor([5, 6])
            self.kept = [token_ids, logprob, mask_len, seeds]
            self.args = Mask(ctypes.sizeof(Mask), 0.0, 2, 37, *(t.data_ptr() for t in self.kept), 99, 3)
            self.outputs = [torch.zeros(2, 37, dtype=torch.int64)]
        elif op == "commit_tokens":
            score = -torch.rand(2, 37, generator=generator) * 1e-39
            token_ids, tokens = torch.arange(74).view(2, 37), torch.full((2, 37), 99)
            tokens[:, :9] = 5
            counts, starts, ends, seeds = (torch.tensor(x) for x in ([3, 4], [0, 6], [30, 37], [5, 6]))
            self.kept = [token_ids, score, tokens, counts, starts, ends, seeds]
            sizes = ctypes.sizeof(Commit), 1, 2, 37
            addresses = [t.data_ptr() for t in self.kept]
            edit = token_ids.data_ptr(), score.data_ptr(), score.data_ptr(), -5e-40, -1e-39
            self.args = Commit(*sizes, *addresses, 99, 3, -5e-40, 0.0, *edit)
            self.outputs = [torch.zeros(2, 37, dtype=torch.int64), torch.zeros(2, dtype=torch.uint8)]
        elif op == "match_tokens":
            # the order of denormals decides which sources are alike
            x, seeds = torch.randn(2, 6 * 8, 19, generator=generator), torch.tensor([5, -6])
            x[:, :, 1:] *= 1e-20
            x[1, 0] = 1e-39
            self.kept = [x, seeds]
            sizes = ctypes.sizeof(Tokens), 0, 2, 6, 8, 19
            self.args = Tokens(*sizes, x.data_ptr(), *x.stride()[:2], 20, seeds.data_ptr(), 3, 0.5)
            rows, starts = torch.zeros(2, 2, 48, dtype=torch.int64), torch.zeros(2, 49, dtype=torch.int64)
            self.outputs = [*rows, starts, torch.zeros(2, dtype=torch.int64)]
            self.matched = Matched(ctypes.sizeof(Matched), *(t.data_ptr() for t in self.outputs))
        elif op in ("merge_tokens", "unmerge_tokens"):
            x = torch.randn(2, 12, 19, generator=generator) * 1e-38
            row = torch.tensor([0, 1, 1, 2, 3, 3, 3, 3, 3, 4, 5, 6]).repeat(2, 1)
            members = torch.arange(12).repeat(2, 1)
            starts = torch.tensor([0, 1, 3, 4, 9, 10, 11, 12, 12, 12, 12, 12, 12]).repeat(2, 1)
            parts = [members, starts] if op == "merge_tokens" else [row]
            self.kept = [x, *parts]
            kind = Merge if op == "merge_tokens" else Unmerge
            sizes = ctypes.sizeof(kind), 0, 2, 12, 7, 19
            self.args = kind(*sizes, x.data_ptr(), *x.stride()[:2], *(t.data_ptr() for t in parts))
            self.outputs = [torch.zeros(2, 7 if op == "merge_tokens" else 12, 19)]
        else:
            x = torch.randn(20, 70, generator=generator) * 1e-38
            w_q = torch.randint(0, 256, (66, 64), generator=generator).to(torch.uint8)
            scale = torch.rand(66, 3, generator=generator) + 0.5
            zero_point = torch.full((66, 3), 7, dtype=torch.uint8)
            self.kept = [x, w_q, scale, zero_point]
            x, w_q, scale, zero_point = (t.data_ptr() for t in self.kept)
            self.args = Layer(ctypes.sizeof(Layer), 0, 20, 70, 66, x, 70, w_q, scale, zero_point, None, 32, 0)
            self.outputs = [torch.zeros(20, 66)]
            if op == "w4a8_linear":
                x_scale = torch.full((1,), 2.0**-126)
                self.kept.append(x_scale)
                self.extra = [pointer(x_scale), I64(1)]
        for name, value in changes.items():
            self.set(name, value)

    def has(self, name):
        # rows are an enum of the one and an array of the other
        fields = dict(self.args._fields_) | dict(getattr(self, "sample", self.args)._fields_)
        return fields.get(name, POINTER) is not POINTER

    def set(self, name, value):
        setattr(self.args if name in dict(self.args._fields_) else self.sample, name, value)

    def workspace(self, where):
        if self.op in WITHOUT_WORKSPACE:
            return 0
        query = getattr(LIBRARY, f"mgt_{self.op}_workspace")
        return query(ctypes.byref(where), ctypes.byref(self.args))

    def __call__(self, where, num_bytes=None):
        """Return the status and what was written."""
        index = I64(-1)
        lent = []
        if self.op not in WITHOUT_WORKSPACE:
            num_bytes = self.workspace(where) if num_bytes is None else num_bytes
            # a call that must refuse before it touches memory is told of more than there is
            memory = torch.empty(min(max(num_bytes, 0), 2**27), dtype=torch.uint8)
            lent = [pointer(memory), I64(num_bytes)]
        outputs = [ctypes.byref(self.drawn)] if self.op == "sample_tokens" else [pointer(x) for x in self.outputs]
        if self.op == "match_tokens":
            outputs = [ctypes.byref(self.matched)]
        if self.op == "commit_tokens":
            committed = Committed(ctypes.sizeof(Committed), *outputs)
            outputs = [ctypes.byref(committed)]
        status = getattr(LIBRARY, f"mgt_{self.op}")(
            ctypes.byref(where), ctypes.byref(self.args), *self.extra, *outputs, *lent, ctypes.byref(index)
        )
        self.index = index.value
        # one that went through had all that it asked for
        assert status != OK or not lent or len(memory) >= num_bytes
        return status, [output.clone() for output in self.outputs]


OPS = (
    "sample_tokens", "differential_sample", "mask_by_confidence", "commit_tokens", "match_tokens", "merge_tokens",
    "unmerge_tokens", "w4a8_linear", "w4a16_linear",
)  # fmt: skip
WITHOUT_WORKSPACE = ("mask_by_confidence", "commit_tokens", "merge_tokens", "unmerge_tokens")


def same(first, second):
    # bits: NaN is NaN, and -0 is not 0
    return first[0] == second[0] and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first[1], second[1], strict=True)
    )


@pytest.mark.parametrize("temperature", [1e26, 1e28, 1.4e37, 1.5e37, 1e38, 3e38, torch.finfo(torch.float32).max])
def test_any_temperature_masks_exactly_mask_len(temperature):
    largest = torch.finfo(torch.float32).max
    logprob = -torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) * 8
    logprob[:, :4] = torch.inf
    logprob[1, 10:20] = -torch.inf
    logprob[2, 10:20], logprob[2, 20:30] = -largest, largest
    logprob[3, 4:] *= 1e37
    args = dict(mask_token_id=99, temperature=temperature, seed=torch.arange(4), step=5)
    token_ids = torch.arange(64).expand(4, 64)
    for mask_len in (1, 30, 59, 60):
        expected = mgt_kernels.mask_by_confidence(token_ids, logprob, mask_len, backend="reference", **args)
        assert ((expected == 99).sum(-1) == mask_len).all()
        for isa in ISAS:
            tokens = mgt_kernels.mask_by_confidence(token_ids, logprob, mask_len, backend=isa, **args)
            assert ((tokens == 99).sum(-1) == mask_len).all()
            # in float32, 3.4e38 + 1e29 is 3.4e38
            assert torch.equal(tokens[[0, 1, 3]], expected[[0, 1, 3]]), isa
            assert temperature < 1e30 or torch.equal(tokens[2], expected[2]), isa


@pytest.mark.parametrize("name", ["reference", *ISAS])
@pytest.mark.parametrize("position_major", [False, True])
@pytest.mark.parametrize("guidance_scale", [-3.0, 0.0, 2.0])
def test_an_infinite_logit_is_reported_under_any_guidance(name, position_major, guidance_scale):
    # the -inf that a negative scale makes of it would only forbid the token
    for half in range(2):
        logits = torch.randn(2, 2, 40, 70, generator=torch.Generator().manual_seed(2)).half()
        logits[half, 1, 33, 66] = torch.inf
        cond, uncond = logits.transpose(2, 3).contiguous().transpose(2, 3) if position_major else logits
        args = dict(mask_token_id=2**63 - 1, seed=1, step=0, temperature=0.0, guidance_scale=guidance_scale)
        tokens = torch.full((2, 40), 2**63 - 1)
        with pytest.raises(ValueError, match="sample 1, position 33 holds NaN or"):
            mgt_kernels.sample_tokens(cond, tokens, uncond_logits=uncond, backend=name, **args)
        # a forbidden token is not looked at
        logits[1 - half, 1, 33, 66] = -torch.inf
        cond, uncond = logits.transpose(2, 3).contiguous().transpose(2, 3) if position_major else logits
        mgt_kernels.sample_tokens(cond, tokens, uncond_logits=uncond, backend=name, **args)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0xFFFFFFFF, 0x7F800001, 0x7FC00100, 0x7FFFFF80, 0x7FC000FF])
@pytest.mark.parametrize("op", ["sample_tokens", "differential_sample"])
def test_any_nan_is_reported(op, bits):
    # whatever its sign and payload
    for name in ISAS:
        for noise_scale, guided in ((0.0, True), (0.5, True), (0.0, False), (0.5, False)):
            call = Call(op, noise_scale=noise_scale)
            if not guided:
                call.sample.uncond_logits.data = call.sample.second_uncond_logits.data = None
            call.kept[0][0].view(torch.int32)[1, 30, 41] = bits - (bits >> 31 << 32)
            assert call(context(name))[0] == BAD_LOGITS and call.index == 37 + 30, (name, noise_scale, guided)


@pytest.mark.parametrize("mask_token_id", [-(2**63), -1, 70, 2**63 - 1])
def test_any_number_may_be_the_mask(mask_token_id):
    call = Call("sample_tokens", num_tokens=70, mask_token_id=mask_token_id)
    call.kept[1].fill_(mask_token_id)
    expected = Call("sample_tokens")(context())
    assert same(call(context()), expected)


@pytest.mark.parametrize("op", ["sample_tokens", "differential_sample"])
@pytest.mark.parametrize("shape", [(1, 1, 70), (2, 1, 70), (1, 37, 70), (2, 37, 1), (1, 1, 1), (2, 1, 1)])
@pytest.mark.parametrize("stride", [-1, 0, 5, BIG, -(2**63), 2**63 - 1])
def test_a_dimension_of_size_1_has_any_stride(op, shape, stride):
    names = ("stride_sample", "stride_position", "stride_token")
    sizes = dict(zip(("num_samples", "num_positions", "num_tokens"), shape, strict=True))
    for by_position in (False, True):
        results = []
        for odd in (False, True):
            call = Call(op, top_k=0, **sizes)
            for half in (call.sample.logits, call.sample.uncond_logits, call.sample.second_uncond_logits):
                normal = (37 * 70, 1, 37) if by_position else (37 * 70, 70, 1)
                for name, size, usual in zip(names, shape, normal, strict=True):
                    setattr(half, name, stride if odd and size == 1 else usual)
            assert call.workspace(context()) > 0
            results.append(call(context()))
        assert results[0][0] == OK and same(*results), by_position


@pytest.mark.parametrize("op", ["w4a8_linear", "w4a16_linear"])
def test_a_single_row_has_any_stride(op):
    expected = Call(op, num_rows=1)(context())
    for stride in (-1, 0, BIG, -(2**63), 2**63 - 1):
        assert same(Call(op, num_rows=1, x_stride=stride)(context()), expected)
    assert expected[0] == OK


SIZES = {
    "sample_tokens": [
        dict(num_samples=BIG, num_positions=4), dict(num_samples=2**40, num_positions=2**31), dict(num_samples=-1),
        dict(num_positions=BIG), dict(num_tokens=BIG), dict(num_tokens=0), dict(step=2**32),
    ],
    "mask_by_confidence": [
        dict(num_samples=BIG, num_positions=4), dict(num_samples=2**40, num_positions=2**31), dict(num_samples=BIG),
        dict(num_samples=BIG, num_positions=0), dict(num_positions=-1), dict(num_positions=BIG),
    ],
    "w4a8_linear": [
        dict(num_rows=BIG), dict(num_rows=2**61, x_stride=70), dict(num_rows=2**40, x_stride=2**40),
        dict(num_inputs=BIG), dict(num_outputs=BIG), dict(num_rows=2**50, num_outputs=2**30),
        dict(num_rows=2**60, num_inputs=1, num_outputs=1, x_stride=1), dict(x_stride=69), dict(group_size=BIG),
    ],
}  # fmt: skip
SIZES["w4a16_linear"] = SIZES["w4a8_linear"]
SIZES["commit_tokens"] = [
    *SIZES["mask_by_confidence"], dict(rule=3, num_positions=2**20 + 1), dict(step=-1),
]  # fmt: skip
SIZES["match_tokens"] = [
    dict(num_samples=BIG), dict(num_samples=-1), dict(num_samples=2**40, stride_sample=2**40), dict(height=BIG),
    dict(width=BIG), dict(height=2**32, width=2**32), dict(height=2**16, width=2**15), dict(height=0), dict(width=-2),
    dict(height=3), dict(width=7), dict(num_channels=0), dict(num_channels=BIG), dict(num_channels=2**61),
    dict(num_channels=2**63 - 1), dict(num_merged=37), dict(num_merged=-2), dict(num_merged=BIG), dict(step=-1),
    dict(step=2**32), dict(stride_sample=BIG), dict(stride_sample=-BIG), dict(stride_token=2**63 - 1),
    dict(stride_token=-(2**63)), *(dict(num_merged=-1, threshold=x) for x in (float("nan"), 1.01, -1.01)),
]  # fmt: skip
SIZES["merge_tokens"] = SIZES["unmerge_tokens"] = [
    dict(num_samples=BIG), dict(num_samples=-1), dict(num_tokens=-1), dict(num_rows=-1), dict(num_rows=13),
    dict(num_channels=-1), dict(num_channels=BIG), dict(num_tokens=BIG), dict(num_tokens=2**60, num_channels=2**40),
    dict(num_tokens=2**62, num_channels=0), dict(num_samples=2**40, num_tokens=2**31), dict(num_rows=BIG),
    dict(num_tokens=2**63 - 1), dict(stride_sample=BIG), dict(stride_token=-BIG), dict(stride_sample=-(2**63)),
    dict(stride_token=2**63 - 1),
]  # fmt: skip
SIZES["differential_sample"] = [*SIZES["sample_tokens"], dict(num_samples=2**20, num_positions=2**31, num_tokens=2**30)]


@pytest.mark.parametrize("op", OPS)
def test_sizes_near_2_to_62_are_refused(op):
    for changes in SIZES[op]:
        call = Call(op, **changes)
        if op not in WITHOUT_WORKSPACE:
            assert call.workspace(context()) == -1, changes
        assert call(context(), 2**40)[0] == INVALID, changes


@pytest.mark.parametrize("op", ["sample_tokens", "differential_sample"])
def test_offsets_near_2_to_62_are_refused(op):
    for name in ("stride_sample", "stride_position"):
        for stride in (BIG, -BIG, 2**63 - 1, -(2**63)):
            for half in ("logits", "uncond_logits", "second_uncond_logits"):
                call = Call(op)
                setattr(getattr(call.sample, half), name, stride)
                assert call.workspace(context()) == -1 and call(context(), 2**40)[0] == INVALID


def test_draws_check_their_sizes():
    words = torch.zeros(4, dtype=torch.uint32)
    for first, num in ((-1, 1), (0, -1), (0, BIG), (BIG, 1), (2**32, 1), (2**63 - 1, 2**63 - 1)):
        status = LIBRARY.mgt_philox(ctypes.byref(context()), I64(0), 0, 0, 0, I64(first), I64(num), pointer(words))
        assert status == INVALID, (first, num)
    for num in (-1, 2**31, BIG):
        assert LIBRARY.mgt_gaussian(ctypes.byref(context()), I64(0), 0, 0, I64(num), pointer(words)) == INVALID


@pytest.mark.parametrize("op", OPS)
def test_any_number_of_threads_works_or_is_refused(op):
    asked = []

    @POOL
    def pool(body, data, num_threads, flags):
        asked.append(num_threads)
        for _ in range(num_threads + 1):
            body(data)

    expected = Call(op)(context())
    assert expected[0] == OK
    for num_threads in (2, 1000, 2**29, 2**31 - 1):
        assert same(Call(op)(context(num_threads=num_threads, pool=pool)), expected)
        # its own threads too
        assert same(Call(op)(context(num_threads=num_threads)), expected)
    if op == "w4a16_linear":
        # enough rows for more threads than any machine can start
        call, x, y = Call(op, num_rows=2**18, num_inputs=1, x_stride=1), torch.ones(2**18), torch.empty(2**18, 66)
        call.args.x, call.outputs = x.data_ptr(), [y]
        assert call(context(num_threads=2**31 - 1, pool=pool))[0] == OK and max(asked) >= 16
    # an OpenMP runtime ends a process that asks for thousands
    assert all(2 <= number <= max(16, os.cpu_count()) for number in asked)
    for num_threads in (0, -1, -(2**31)):
        assert Call(op).workspace(context(num_threads=num_threads)) <= 0
        assert Call(op)(context(num_threads=num_threads), 2**20)[0] == INVALID


def test_commits_refuse_numbers_out_of_range_and_write_nothing():
    nan, inf = float("nan"), float("inf")
    bad = [
        *(dict(rule=rule, value=value) for rule in (1, 2, 3) for value in (nan, inf, -inf)),
        *(dict(rule=rule, value=-1.0) for rule in (2, 3)), dict(temperature=-1.0), dict(temperature=nan),
        dict(replace_above=nan), dict(mask_below=nan), dict(argmax=None), dict(max_logprob=None), dict(score=None),
        dict(tokens=None), dict(token_ids=None), dict(counts=None), dict(seeds=None),
    ]  # fmt: skip
    for changes in bad:
        call = Call("commit_tokens", **changes)
        status, outputs = call(context())
        assert status == INVALID and not outputs[0].any() and not outputs[1].any(), changes
    for kept, index, value, status, where in ((3, 1, -1, 8, 1), (1, (1, 36), nan, 9, 73), (5, 0, 38, 10, 0)):
        call = Call("commit_tokens")
        call.kept[kept][index] = value
        assert call(context())[0] == status and call.index == where and not call.outputs[0].any()
    for outputs in (Committed(8, None, None), Committed(ctypes.sizeof(Committed), None, None)):
        call = Call("commit_tokens")
        arguments = ctypes.byref(context()), ctypes.byref(call.args), ctypes.byref(outputs), None
        assert LIBRARY.mgt_commit_tokens(*arguments) == INVALID
    # done need not be asked for, nor a window or an edit be given
    call = Call("commit_tokens", starts=None, ends=None, argmax=None, max_logprob=None, known_logprob=None)
    outputs = Committed(ctypes.sizeof(Committed), call.outputs[0].data_ptr(), None)
    arguments = ctypes.byref(context()), ctypes.byref(call.args), ctypes.byref(outputs), None
    assert LIBRARY.mgt_commit_tokens(*arguments) == OK and call.outputs[0].any() and not call.outputs[1].any()


def test_a_match_refuses_what_is_missing_and_names_the_first_bad_token():
    nan, inf = float("nan"), float("inf")
    for name in ("rows", "members", "starts", "num_rows"):
        call = Call("match_tokens")
        setattr(call.matched, name, None)
        assert call(context())[0] == INVALID and not any(output.any() for output in call.outputs), name
    assert Call("match_tokens", x=None)(context())[0] == INVALID
    call = Call("match_tokens")
    assert call(context(), call.workspace(context()) - 1)[0] == INVALID and not call.outputs[0].any()
    for size in (0, 39, 41):
        call = Call("match_tokens")
        call.matched.struct_size = size
        assert call(context())[0] == INVALID and not call.outputs[0].any()
    # destinations are in the even rows and columns without seeds
    for seeds in (None, torch.tensor([5, -6])):
        for places in (((1, 0), (1, 9)), ((0, 47),), ((0, 9), (0, 16), (1, 0)), ((1, 8), (1, 47))):
            for value in (nan, inf, -inf, 1.9e19):
                for name in ISAS:
                    call = Call("match_tokens", seeds=None if seeds is None else seeds.data_ptr())
                    for sample, token in places:
                        call.kept[0][sample, token, 18] = value
                    assert call(context(name, 2))[0] == 7 and call.index == 48 * places[0][0] + places[0][1]
    # nothing of no samples, whatever the pointers are
    assert Call("match_tokens", num_samples=0, x=None)(context())[0] == OK
    # a threshold counts where num_merged says so
    assert Call("match_tokens", threshold=nan)(context())[0] == OK
    status, outputs = Call("match_tokens", num_merged=-1, threshold=-1.0)(context())
    assert status == OK and outputs[3].tolist() == [12, 12]


def test_broken_matches_are_named_and_nothing_is_written():
    for op, place, index, values in (
        ("merge_tokens", 1, (1, 11), (-1, 12, BIG, -(2**63))),
        ("merge_tokens", 2, (1, 0), (-1, 1, BIG)),
        ("merge_tokens", 2, (1, 3), (-1, 13, BIG, -(2**63), 2**63 - 1)),
        ("merge_tokens", 2, (1, 7), (11, 13, 0)),
        ("unmerge_tokens", 1, (1, 4), (-1, 7, BIG, -(2**63))),
    ):
        for value in values:
            for name in ISAS:
                call = Call(op)
                call.kept[place][index] = value
                status, (y,) = call(context(name, 2))
                assert (status, call.index) == (11, 1) and not y.any(), (op, index, value)
    for op, names in (("merge_tokens", ("x", "members", "starts")), ("unmerge_tokens", ("x", "rows"))):
        for name in names:
            status, (y,) = Call(op, **{name: None})(context())
            assert status == INVALID and not y.any(), (op, name)
        for name in ("num_samples", "num_tokens"):
            changes = {name: 0} | ({"num_rows": 0} if name == "num_tokens" else {})
            assert Call(op, **changes, x=None)(context())[0] == OK, (op, name)
        # without channels the match alone is looked at
        assert Call(op, num_channels=0, x=None)(context())[0] == OK
        call = Call(op, num_channels=0)
        call.kept[1][1, 0] = -1
        assert call(context())[0] == 11


@pytest.mark.parametrize("op", ["match_tokens", "merge_tokens", "unmerge_tokens"])
@pytest.mark.parametrize("stride", [-1, 0, 5, BIG, -(2**63), 2**63 - 1])
def test_one_sample_or_token_has_any_stride(op, stride):
    expected = Call(op, num_samples=1)(context())
    assert expected[0] == OK and same(Call(op, num_samples=1, stride_sample=stride)(context()), expected)
    if op == "match_tokens":
        return
    # one token, or one row that all tokens have
    calls = []
    for changes in ({}, {"stride_token": stride}):
        call = Call(op, num_tokens=1 if op == "merge_tokens" else 12, num_rows=1, num_samples=1, **changes)
        for tensor in call.kept[1:]:
            tensor.zero_()
        if op == "merge_tokens":
            call.kept[2][0, 1] = 1
        calls.append(call(context()))
    assert calls[0][0] == OK and same(*calls)


ENUMS = {
    "dtype": (-1, 3, 255, 2**31 - 1), "scale_dtype": (-1, 1, 3, 256), "variant": (-1, 2, 255),
    "rows": (-1, 3, 255, 2**31 - 1), "rule": (-1, 4, 255), "guidance": (-1, 2, 255), "logprob_of": (-1, 2, 2**31 - 1),
}  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_enum_values_outside_their_lists_are_refused(op):
    for isa in (-1, 7, 255, 2**31 - 1, -(2**31)):
        where = context()
        where.isa = isa
        assert Call(op)(where, 2**20)[0] == UNAVAILABLE
    for name, values in ENUMS.items():
        for value in values:
            call = Call(op)
            if call.has(name):
                call.set(name, value)
                assert call(context(), 2**20)[0] == INVALID, (name, value)
                assert op in WITHOUT_WORKSPACE or call.workspace(context()) == -1, (name, value)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("change", [-8, -1, 1, 8])
def test_structures_of_another_size_are_refused(op, change):
    call = Call(op)
    for argument in {id(args): args for args in (call.args, getattr(call, "sample", call.args))}.values():
        argument.struct_size += change
        assert op in WITHOUT_WORKSPACE or call.workspace(context()) == -1
        assert call(context(), 2**20)[0] == INVALID
        argument.struct_size -= change
    if op == "sample_tokens":
        call.drawn.struct_size += change
        # which the query does not take
        assert call.workspace(context()) > 0 and call(context())[0] == INVALID
        call.drawn.struct_size = 0
        assert call(context())[0] == INVALID
        call.drawn.struct_size = ctypes.sizeof(Drawn)
    if op == "match_tokens":
        call.matched.struct_size += change
        assert call.workspace(context()) > 0 and call(context())[0] == INVALID
        call.matched.struct_size = ctypes.sizeof(Matched)
    assert call(context())[0] == OK


@pytest.mark.parametrize("op", ["sample_tokens", "differential_sample"])
def test_arrays_of_samples_are_checked(op):
    # of the second sample, so that all are looked at
    for place, values in (
        (3, (-1, 2**32 - 36, 2**32, -(2**63), 2**63 - 1)),
        *((place, (torch.nan, torch.inf, -torch.inf)) for place in (4, 5)),
    ):
        for value in values:
            call = Call(op)
            call.kept[place][1] = value
            # the query reads none
            assert call.workspace(context()) > 0 and call(context())[0] == INVALID, value
    call = Call(op)
    call.kept[3][1] = 2**32 - 37
    call.kept[4][1] = -torch.finfo(torch.float32).max / 2**20
    assert call(context())[0] == OK


@pytest.mark.parametrize("op", ["sample_tokens", "differential_sample"])
def test_scalars_of_a_draw_are_checked(op):
    nan, inf, most = float("nan"), float("inf"), torch.finfo(torch.float32).max
    bad = [
        *(dict(softcap=x) for x in (-1.0, -1e-40, nan, inf, 1e-39)),
        *(dict(second_guidance_scale=x) for x in (nan, inf)),
        *(dict(top_k=x) for x in (-1, 71, BIG, -(2**63))), *(dict(top_p=x) for x in (-0.1, nan, 1.0001, inf)),
        *(dict(min_p=x) for x in (-0.1, nan, 1.0, inf)),
    ]  # fmt: skip
    for changes in bad:
        call = Call(op, **changes)
        status, outputs = call(context(), 2**24)
        assert call.workspace(context()) == -1 and status == INVALID, changes
        assert not any(output.any() for output in outputs), changes
    # a second half without a first
    call = Call(op)
    call.sample.uncond_logits.data = None
    assert call.workspace(context()) == -1 and call(context(), 2**24)[0] == INVALID
    good = [dict(softcap=x) for x in (0.0, 1e-38, most)] + [dict(second_guidance_scale=x) for x in (-most, 0.0)]
    for changes in good:
        call = Call(op, second_guidance_scales=None, **changes)
        assert call.workspace(context()) > 0 and call(context())[0] in (OK, BAD_LOGITS), changes
    for changes in (dict(top_k=69), dict(top_p=0.5), dict(min_p=1e-45), dict(top_p=1e-45, min_p=1 - 2**-24)):
        call = Call(op, **(dict(top_k=0, top_p=0.0, min_p=0.0) | changes))
        # a differential draw is never truncated
        assert call(context(), 2**24)[0] == (INVALID if op == "differential_sample" else OK), changes
    for changes in (dict(top_k=70), dict(top_p=1.0)):
        call = Call(op, **(dict(top_k=0, top_p=0.0, min_p=0.0) | changes))
        assert call(context())[0] == OK


def test_zeros_of_the_members_that_truncate_leave_the_plain_draw():
    plain = dict(top_k=0, top_p=0.0, min_p=0.0)
    expected = Call("sample_tokens", **plain)(context())
    assert expected[0] == OK
    small = Call("sample_tokens", **plain).workspace(context())
    for changes in (dict(top_k=70), dict(top_p=1.0), dict(logprob_of=1)):
        call = Call("sample_tokens", **(plain | changes))
        assert same(call(context()), expected) and call.workspace(context()) == small
    # one tile of a row, where the row of a truncated draw waits whole: 64 maxima, keys and weights
    tile = 2048 * 4
    assert small == 64 + tile
    assert Call("sample_tokens", **(plain | dict(top_p=0.5))).workspace(context()) == 64 + 3 * tile + 64 * 4


def test_token_ids_are_required():
    call = Call("sample_tokens")
    call.drawn.token_ids = None
    assert call(context())[0] == INVALID


def test_a_differential_draw_has_a_sample_of_masked_rows():
    for rows in (1, 2):
        call = Call("differential_sample", rows=rows)
        assert call.workspace(context()) == -1 and call(context(), 2**20)[0] == INVALID
    call = Call("differential_sample", sample=None)
    assert call.workspace(context()) == -1 and call(context(), 2**20)[0] == INVALID


@pytest.mark.parametrize("token", [-1, 70, 2**63 - 1])
def test_a_known_token_outside_the_codebook_is_refused_where_its_logprob_is_asked_for(token):
    for rows, asked, status in ((1, True, BAD_TOKEN), (2, True, BAD_TOKEN), (0, True, OK), (1, False, OK)):
        # 71 is the mask, and in no codebook
        call = Call("sample_tokens", rows=rows, mask_token_id=71)
        call.kept[1].fill_(71)
        call.kept[1][1, [30, 32]] = token
        if not asked:
            call.drawn.known_logprob = None
        assert call(context())[0] == status, (rows, asked)
        assert call.index == (37 + 30 if status else -1)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_outputs_do_not_depend_on_which_others_are_asked_for(rows):
    names = [name for name, _ in Drawn._fields_[2:]]
    for isa in ISAS:
        call = Call("sample_tokens", rows=rows)
        call.kept[1][:, ::3] = 6
        status, expected = call(context(isa))
        assert status == OK
        for name in names:
            for others in (False, True):
                call = Call("sample_tokens", rows=rows)
                call.kept[1][:, ::3] = 6
                for other in names:
                    if (other != name) != others:
                        setattr(call.drawn, other, None)
                status, results = call(context(isa))
                assert status == OK
                for output, result, right in zip(["token_ids", *names], results, expected, strict=True):
                    if getattr(call.drawn, output):
                        assert torch.equal(result.view(torch.uint8), right.view(torch.uint8)), (isa, output)
                    else:
                        assert not result.any(), output


def test_cpp_reads_enums_as_integers():
    # the enums have a fixed underlying type, so that no number is undefined behaviour
    header = (CSRC / "mgt_kernels.h").read_text()
    assert header.count("typedef enum MGT_INT32 {") == len(re.findall(r"\benum\b", header)) == 8
    assert "#define MGT_INT32 : int32_t" in header


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("op", OPS)
def test_results_do_not_depend_on_the_floating_point_state(op, name):
    changes = {"temperature": 0.0, "noise_scale": 0.0} if op == "sample_tokens" else {}
    num_threads = 2
    expected = Call(op, **changes)(context(name, num_threads))
    assert expected[0] == OK
    # upwards, downwards, to zero
    for mode in (0x800, 0x400, 0xC00):
        call, where = Call(op, **changes), context(name, num_threads)
        num_bytes = call.workspace(where)
        LIBM.fesetround(mode)
        try:
            result = call(where, num_bytes)
            left = LIBM.fegetround()
        finally:
            LIBM.fesetround(0)
        assert left == mode and same(result, expected), hex(mode)
    call = Call(op, **changes)
    assert torch.set_flush_denormal(True)
    try:
        assert same(call(context(name, num_threads)), expected)
        # what the caller set is still set
        assert float(torch.tensor(1e-39) * 1.0) == 0.0
    finally:
        torch.set_flush_denormal(False)


def test_the_states_would_be_seen():
    # in PyTorch's own arithmetic on the inputs above
    x = Call("w4a8_linear").kept[0].clone()
    product = x * 0.3
    assert ((product != 0) & (product.abs() < 1e-38)).any()
    torch.set_flush_denormal(True)
    try:
        flushed = x * 0.3
    finally:
        torch.set_flush_denormal(False)
    assert not torch.equal(flushed, product)


ONCE = """
import ctypes, os, sys
library = ctypes.CDLL(sys.argv[1])
isa = ctypes.c_int(0)
print([(library.mgt_resolve_isa(0, ctypes.byref(isa)), isa.value) for os.environ["MGT_ISA"] in sys.argv[2:]])
"""


@pytest.mark.parametrize("first, expected", [("scalar", (OK, 1)), ("avx1024", (UNAVAILABLE, 0))])
def test_mgt_isa_is_read_once(first, expected):
    names = [first, "scalar", "nothing", ""]
    command = [sys.executable, "-c", ONCE, str(mgt_kernels.library_path()), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert eval(done.stdout) == [expected] * 4


# the real instruction's answer, but for one bit
MASKED_CPUID = """
#include <cpuid.h>
static inline int masked_cpuid(unsigned leaf, unsigned subleaf, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  if (!__get_cpuid_count(leaf, subleaf, a, b, c, d)) return 0;
  if (leaf == MASKED_LEAF && subleaf == MASKED_SUBLEAF) *MASKED_WORD &= ~(1u << MASKED_BIT);
  return 1;
}
#define __get_cpuid_count masked_cpuid
"""
MAIN = """
#include <mgt_kernels.h>
#include <cstdio>
int main() {
  for (int isa = 1; isa <= 6; ++isa) {
    mgt_isa resolved;
    if (mgt_resolve_isa(static_cast<mgt_isa>(isa), &resolved) == MGT_OK) std::printf("%s ", mgt_isa_name(resolved));
  }
}
"""


def target_features():
    """The names in the target string of each instruction set, as the compiler sees them."""
    macros = dict(re.findall(r"#define (MGT_\w+_FEATURES) (.+)", (CSRC / "isa.h").read_text()))

    def expand(text):
        for name, value in macros.items():
            text = re.sub(rf"\b{name}\b", lambda _, value=value: value, text)
        return text

    def names(text):
        while "MGT_" in text:
            text = expand(text)
        return "".join(re.findall(r'"(.*?)"', text)).split(",")

    return {name[4:-9].lower(): names(value) for name, value in macros.items()}


def test_every_feature_of_a_target_region_is_probed(tmp_path):
    if "avx2" not in ISAS or shutil.which("c++") is None:
        pytest.skip("needs a compiler, and an instruction set to lose")
    features = target_features()
    assert set(features) == set(NAMES[2:]) and "f16c" in features["avx2"]
    for region in (CSRC / "isa.h").read_text().split("MGT_TARGET_BEGIN(")[3:]:
        assert re.match(r"MGT_\w+_FEATURES\)", region)
    probed = {
        name: (leaf, subleaf, word, bit)
        for name, leaf, subleaf, word, bit in re.findall(
            r'\{"([\w-]+)", (\d+), (\d+), kE(\w)x, (\d+)', (CSRC / "isa.cpp").read_text()
        )
    }
    assert set(probed) == {name for names in features.values() for name in names}
    (tmp_path / "cpuid_masked.h").write_text(MASKED_CPUID)
    (tmp_path / "main.cpp").write_text(MAIN)

    def left(*options):
        program = tmp_path / "program"
        sources = [CSRC / "isa.cpp", tmp_path / "main.cpp"]
        build = ["c++", "-std=c++17", "-O0", f"-I{CSRC}", *options, *sources, "-o", program]
        subprocess.run(list(map(str, build)), check=True)
        return subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()

    # one of each instruction set; a feature is masked as a hypervisor does it
    for name in ("f16c", "fma", "avx512dq", "avx512vnni", "amx-int8"):
        leaf, subleaf, word, bit = probed[name]
        cpuid = {"LEAF": leaf, "SUBLEAF": subleaf, "WORD": word, "BIT": bit}
        masked = [f"-DMASKED_{key}={value}" for key, value in cpuid.items()]
        expected = [isa for isa in ISAS if isa == "scalar" or name not in features[isa]]
        assert left(*masked, "-include", tmp_path / "cpuid_masked.h") == expected, name


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs free-threaded Python")
def test_importing_leaves_the_gil_off():
    assert not sys._is_gil_enabled()


def test_the_module_declares_itself_safe_without_the_gil():
    source = (CSRC / "bindings.cpp").read_text()
    assert "py::mod_gil_not_used()" in source and not re.search(r"^\s*(static|thread_local)\b.*[=;]\s*$", source, re.M)
