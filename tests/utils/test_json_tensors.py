"""Nested values with tensors survive JSON bit for bit."""

import json

import pytest
import torch

from kspec_guidance.utils.json_tensors import from_json, to_json


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_return_bit_for_bit(dtype, shape):
    x = (100 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = from_json(json.loads(json.dumps(to_json({"rows": [x, None], "name": "a", "n": 3}))))
    assert found["rows"][0].dtype == dtype
    assert torch.equal(found["rows"][0], x)
    assert (found["rows"][1], found["name"], found["n"]) == (None, "a", 3)
