"""The index of the step whose distributions a differential history holds, for launchers without torch."""

import triton
import triton.language as tl


@triton.jit
def _advance_history_step_kernel(history_step_ptr, step_ptr, HAS_HISTORY: tl.constexpr):
    step = tl.load(step_ptr)
    if HAS_HISTORY:
        # a step that does not continue the generation leaves its index as it is
        history_step = tl.load(history_step_ptr)
        step = tl.where(history_step == step - 1, step, history_step)
    tl.store(history_step_ptr, step)
