import shutil

import pytest
import torch
from safetensors.torch import load_file

from kspec_guidance import SPARKE, KernelGuidance, MMDGuidance, NoveltyGuidance
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.guidance.spaces import Activations, Embedder, Pixels, Pooled
from kspec_guidance.kernels import CosineKernel, GaussianKernel, Kernel, PolynomialKernel
from kspec_guidance.objectives import RKE, Vendi

REFERENCE = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))

GUIDES = {
    "sparke": lambda: SPARKE(0.4, kernel=GaussianKernel(0.7), start=0.1, stop=0.5, every=2, seed=7),
    "product kernel": lambda: KernelGuidance(RKE(GaussianKernel(0.5)), 0.2, sigma_interval=(0.1, 5.0)),
    "pooled, random features": lambda: SPARKE(
        space=Pooled(2),
        feature_map=RandomFourierFeatures(GaussianKernel(1.2), 12, 64, seed=3),
        prompt_feature_map=RandomFourierFeatures(GaussianKernel(0.5), 4, 32),
    ),
    "mmd": lambda: MMDGuidance(REFERENCE, kernel=PolynomialKernel(), reference_prompts=torch.randn(5, 4)),
    "novelty": lambda: NoveltyGuidance(REFERENCE, 0.3),
    "vendi": lambda: KernelGuidance(Vendi(CosineKernel(), order=float("inf")), 0.2, space=Activations("mid_block")),
    "sum": lambda: SPARKE(0.3) + MMDGuidance(REFERENCE),
}


@pytest.mark.parametrize("name", GUIDES)
def test_config_round_trip_reproduces_guide(name, tmp_path, g):
    guide = GUIDES[name]()
    guide.save_config(tmp_path)
    loaded = KernelGuidance.from_config(tmp_path)
    assert type(loaded) is type(guide)
    assert (loaded.seed, len(loaded.terms)) == (guide.seed, len(guide.terms))
    for a, b in zip(guide.terms, loaded.terms, strict=True):
        for k in ("scale", "space", "start", "stop", "every", "sigma_interval", "transforms"):
            assert getattr(a, k) == getattr(b, k)
    x, t = torch.randn(4, 3, 2, 2, generator=g), torch.randn(4, 4, generator=g)
    assert torch.equal(guide.gradient(x, t), loaded.gradient(x, t))
    assert not [f for f in tmp_path.iterdir() if f.suffix not in (".json", ".safetensors")]


def test_invalid_config_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"write them with guide.save_config\(folder\)"):
        KernelGuidance.from_config(tmp_path)
    (tmp_path / "kspec_guidance.json").write_text("{oops")
    with pytest.raises(ValueError, match="not valid JSON"):
        KernelGuidance.from_config(tmp_path)
    with pytest.raises(ValueError, match="format None"):
        KernelGuidance.from_config({})
    config, _ = SPARKE().to_config()
    config["terms"][0]["objective"]["objective"] = "os.system"
    with pytest.raises(ValueError, match=r"unknown objective 'os.system'"):
        KernelGuidance.from_config(config)

    class CustomKernel(Kernel):
        def vjp(self, x, y, weight):
            return x

    with pytest.raises(TypeError, match="CustomKernel cannot be saved"):
        KernelGuidance(RKE(CustomKernel()), 0.3).save_config(tmp_path)
    for space in (Embedder(embedder=torch.nn.Flatten()), Pixels(vae=torch.nn.Flatten())):  # networks are not saved
        with pytest.raises(TypeError, match="cannot be saved as settings; build it in code"):
            SPARKE(space=space).save_config(tmp_path)
    shutil.rmtree(tmp_path)


def test_tensors_that_several_terms_share_are_saved_once_and_parts_of_them_alone(tmp_path):
    rows = torch.randn(12, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    guide = MMDGuidance(rows[:4], baseline=rows) + NoveltyGuidance(rows[:4], baseline=rows)
    guide.save_config(tmp_path)
    first, second = (term.objective for term in KernelGuidance.from_config(tmp_path).terms)
    for found, wanted in ((first.reference, rows[:4]), (first.baseline, rows), (second.reference, rows)):
        assert torch.equal(found, wanted)
    assert len(load_file(tmp_path / "kspec_guidance.safetensors")) == 2
