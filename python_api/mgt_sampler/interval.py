"""Which step a pipeline takes next, and whether that is within an interval of guidance; see `halves`."""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

from torch import Tensor

from .arguments import number


def check_interval(interval: object) -> tuple[float, float]:
    """Return (start, end), if these are two numbers with 0 <= start <= end <= 1.

    Raises:
        TypeError: no two numbers.
        ValueError: out of range.
    """
    expected = "two numbers (start, end) with 0 <= start <= end <= 1"
    given = interval.tolist() if hasattr(interval, "tolist") else interval
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"guidance_interval: expected {expected}, got {interval!r}")
    start, end = (number("guidance_interval", share, expected) for share in given)
    if not 0 <= start <= end <= 1:
        raise ValueError(f"guidance_interval: expected {expected}, got {interval!r}")
    return start, end


class Step(NamedTuple):
    """A step of a run.

    Attributes:
        k: 0 to T - 1.
        num_inference_steps: T.
    """

    k: int
    num_inference_steps: int

    @property
    def share(self) -> float:
        """k / T."""
        return self.k / self.num_inference_steps


class NextStep:
    """Which step a thread takes next, as its scheduler can tell: several threads may share one scheduler.

    A run ends with its last step, or where nobody has the sample that it goes on from, as after an exception. A copy by
    `copy.deepcopy` goes on with this thread's run, one by `pickle` knows of none.
    """

    def __init__(self) -> None:
        """No run."""
        self._of_thread = threading.local()

    def set(self, step: Step | None, sample: Tensor | None = None) -> None:
        """The next step of this thread, which goes on from a sample; None: there is no run."""
        self._of_thread.found = step, None if sample is None else weakref.ref(sample)

    def get(self) -> Step | None:
        """The next step of this thread; None: there is no run."""
        step, sample = getattr(self._of_thread, "found", (None, None))
        return None if sample is not None and sample() is None else step

    def __getstate__(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start afresh."""
        self.__init__()  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> NextStep:
        """Take this thread's step along."""
        copied = NextStep()
        if hasattr(self._of_thread, "found"):
            copied._of_thread.found = self._of_thread.found
        return copied


class Progress:
    """A pipeline's `progress_bar`, told how many steps are left of the run: inpainting tells it no sooner."""

    def __init__(self, pipe: Any, next_step: NextStep) -> None:
        """Hold the pipeline and what is told."""
        self._pipe, self._next_step = pipe, next_step
        self._original = vars(pipe).get("progress_bar")

    def __call__(self, iterable: Any = None, total: int | None = None) -> Any:
        """`DiffusionPipeline.progress_bar`."""
        step = self._next_step.get()
        if step is not None and total is not None and 0 < total <= step.num_inference_steps:
            self._next_step.set(Step(step.num_inference_steps - total, step.num_inference_steps))
        if self._original is not None:
            return self._original(iterable, total)
        return type(self._pipe).progress_bar(self._pipe, iterable, total)
