"""The script for people with a GPU, as far as it runs without one."""

import dataclasses

import on_device
import pytest
import torch
from cases import CASES
from driver import standin_gpu

CASE = next(case for case in CASES if case.op == "mask_by_confidence")


def test_a_case_passes_and_can_fail(monkeypatch):
    monkeypatch.setattr(on_device, "to", lambda device, arguments: arguments)
    wrong = dataclasses.replace(CASE, expected=lambda *arguments: (CASE.expected(*arguments)[0] + 1,))
    with standin_gpu(80):
        assert on_device.run(CASE) == ""
        assert on_device.run(wrong).startswith("AssertionError")


def test_moving_keeps_strides():
    tensor = torch.empty(2, 3, 4).mT
    moved, number = on_device.to("cpu", (tensor, 3))
    assert moved.stride() == tensor.stride() and number == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so():
    with pytest.raises(SystemExit, match="expected a CUDA device"):
        on_device.main()
