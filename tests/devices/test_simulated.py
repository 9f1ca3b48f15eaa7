"""The simulated accelerator obeys the rules of a device."""

import pytest
import torch
from torch import nn

from kspec_guidance.kernels.distances import row_norms
from kspec_guidance.utils.transfer import read
from tests.devices.simulated import DeviceTensor, SimulatedDevice

KINDS = pytest.mark.parametrize("kind", ["cuda", "mps"])


@KINDS
def test_devices_do_not_mix(kind):
    with SimulatedDevice(kind) as simulated:
        x, layer = torch.zeros(1, 2, device=simulated.device), nn.Linear(2, 2)
        with pytest.raises(RuntimeError, match="expected all tensors on the same device"):
            layer(x)
        with pytest.raises(RuntimeError, match="expected all tensors on the same device"):
            layer.to(simulated.device)(x.cpu())
        with pytest.raises(RuntimeError, match="a generator of cpu"):
            torch.randn(2, device=simulated.device, generator=torch.Generator())


@KINDS
def test_modules_move_and_train_and_weights_on_meta_stay_there(kind):
    with SimulatedDevice(kind) as simulated:
        layer = nn.Linear(2, 2).to(simulated.device)
        assert isinstance(layer.weight, nn.Parameter)
        assert layer.weight.device == simulated.device
        layer(torch.ones(1, 2, device=simulated.device)).sum().backward()
        assert layer.weight.grad.device == simulated.device
        assert torch.equal(layer.weight.grad.cpu(), torch.ones(2, 2))
        assert layer.to("meta").weight.device.type == "meta"
        assert not isinstance(layer.weight, DeviceTensor)


def test_float64_exists_on_cuda_alone():
    x = torch.ones(2)
    with SimulatedDevice("cuda") as simulated:
        assert x.to(simulated.device).double().dtype == torch.float64
    with SimulatedDevice("mps") as simulated, pytest.raises(TypeError, match="float64 does not exist on mps"):
        x.to(simulated.device).double()


@KINDS
def test_waits_of_the_package_are_counted(kind):
    with SimulatedDevice(kind) as simulated:
        x = torch.ones(2, 3, device=simulated.device)
        row_norms(x)
        assert not simulated.reads
        read(x.sum(), x)
        assert sum(simulated.reads.values()) == 1
        with simulated.not_counting():
            read(x)
        assert sum(simulated.reads.values()) == 1
