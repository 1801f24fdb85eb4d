"""aMUSEd's three pipelines (diffusers), and Meissonic's, which have the same scheduler."""

from __future__ import annotations

from typing import Any

from ..scheduler import MGTScheduler


def replacements(pipe: Any) -> dict[str, Any]:
    """A scheduler of ours, with the settings of the pipeline's."""
    before = pipe.scheduler
    if isinstance(before, MGTScheduler):
        return {}
    if type(before).__name__ not in ("AmusedScheduler", "Scheduler"):
        raise TypeError(f"obj.scheduler: expected an AmusedScheduler or Meissonic's, got {type(before).__name__}")
    return {"scheduler": MGTScheduler.from_config(before.config)}
