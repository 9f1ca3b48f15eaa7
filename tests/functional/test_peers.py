"""Scores against values that the authors' code prints (benchmarks/peer_values.py writes them, with its commits)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kspec_guidance import functional as F
from kspec_guidance.kernels import GaussianKernel

DATA = Path(__file__).parents[1] / "data" / "peers"
INPUTS = load_file(DATA / "inputs.safetensors")
VALUES = json.loads((DATA / "values.json").read_text())


def expected(score, key):
    peer = VALUES[score]
    return pytest.approx(peer["printed"][key], abs=1.01 * peer["rounding"])


@pytest.mark.parametrize(
    ("key", "order"), [("VENDI-1", 1.0), ("VENDI-1.5", 1.5), ("RKE", 2.0), ("VENDI-inf", float("inf"))]
)
def test_fkea_equals_the_authors_code(key, order):
    def feature_map(x):
        product = x @ INPUTS["frequencies"]
        return torch.cat([product.cos(), product.sin()], dim=1) / INPUTS["frequencies"].shape[1] ** 0.5

    assert F.vendi_score(INPUTS["x"], order=order, feature_map=feature_map).item() == expected("FKEA", key)


@pytest.mark.parametrize("eta", [1.0, 3.0])
def test_ken_equals_the_authors_code(eta):
    found = F.ken_score(INPUTS["x"], INPUTS["y"], GaussianKernel(1.5), eta=eta)
    assert found.item() == expected("KEN", f"eta={eta:g}")


def test_scendi_equals_the_authors_code():
    """Their cosine kernel compares columns of the features (dimensions), so the columns are scaled the same way here."""

    def columns(z):
        return z / z.norm(dim=0, keepdim=True) * (len(z) / z.shape[1]) ** 0.5

    maps = columns(INPUTS["x"]), columns(INPUTS["prompt_features"])
    args = INPUTS["x"], INPUTS["prompt_features"], maps
    assert F.scendi_score(*args).item() == expected("Scendi", "images")
    assert F.prompt_vendi_score(*args).item() == expected("Scendi", "prompts")
