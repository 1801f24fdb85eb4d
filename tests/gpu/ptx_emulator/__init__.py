"""Run the PTX that Triton hands to ptxas, on the CPU, to check GPU code without a GPU.

Modelled, sm_80 to sm_90:

- all threads of a batch of CTAs in lock step, divergence by "lowest basic block first"; bar.sync 0, with an error where
  threads of the CTA are missing; shfl, vote, redux, elect and activemask, with an error where members are missing
- global memory: an access must lie in a registered buffer and be naturally aligned; a race, two accesses to a byte by
  different CTAs, or by different warps in one barrier interval, of which one is a write, is reported (in buffers of
  more than 1 MiB only from the first write on)
- shared memory: starts poisoned; an access must lie in the bytes that the launch reserves; a race, two accesses to a
  byte in one barrier interval by different warps of which one is a write, is reported
- cp.async lands at its wait_group, the latest moment at which it may; what it may spoil from its issue on is reported
- wgmma reads until the wait_group that covers it: until then a write to its operands, in shared memory or in registers,
  and any access to its sums are reported; so is a wgmma that reads what was written through the generic proxy, with
  no fence.proxy.async since
- integers exactly; add, sub, mul, fma, div and sqrt with .rn exactly, NaN as 0x7fffffff; approximations as numpy's
  float32 function, off by up to `approx_ulp` units in the last place, a function of opcode and argument
- atomics in the order of the lanes; mma.sync, ldmatrix, stmatrix and wgmma

An opcode, a modifier or a type that is not modelled raises PtxError, as does the read of a register that no lane has
written. A lane that a predicate kept from writing reads poison.

Not modelled: time; ptxas, which may contract a mul and an add that do not say .rn; memory order between CTAs, CTAs that
wait for one another; races between atomics and plain accesses; the order in which tensor
cores sum; a missing wgmma.fence; TMA, mbarrier, clusters, tcgen05, calls, generic addresses of shared memory.
"""

from ptx_emulator.machine import Emulator, Program, Report
from ptx_emulator.parser import parse
from ptx_emulator.ptx_types import PtxError

__all__ = ["Emulator", "Program", "PtxError", "Report", "parse"]
