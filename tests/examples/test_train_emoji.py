"""The training code of the embedded pipeline: captions with known modes, latents without inactive channels, resumption."""

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "train_emoji"))
import captions
import latents
import loop
import muon
import train_vae
from diffusers import AutoencoderKL

TABLE = [
    {
        "unified": "1F3C3", "name": "RUNNER", "short_name": "runner", "subcategory": "person-activity", "image":
        "1f3c3.png", "has_img_google": True, "has_img_twitter": True,
        "skin_variations": {"1F3FF": {"image": "1f3c3-1f3ff.png"}, "1F3FB-1F3FF": {"image": "two.png"}},
    },
    {
        "unified": "1F3C3-200D-2640-FE0F", "name": "WOMAN RUNNING", "short_name": "woman-running",
        "subcategory": "person-activity", "image": "w.png", "has_img_google": True, "has_img_twitter": False,
    },
    {
        "unified": "1F99C", "name": "PARROT", "short_name": "parrot", "subcategory": "animal-bird", "image": "p.png",
        "has_img_google": True, "has_img_twitter": True,
    },
]  # fmt: skip


def test_prompts_have_countable_modes():
    entries = captions.build_entries(TABLE)
    count = lambda prompt: len(captions.modes(entries, prompt))  # noqa: E731
    assert count("runner") == 5
    assert count("runner, dark skin tone") == 2
    assert count("runner, woman") == 1
    assert count("runner, woman, twemoji style") == 0
    assert count("bird") == count("parrot") == 2
    rng = random.Random(0)
    for entry in entries:
        assert all(entry.answers(entry.caption(rng)) for _ in range(20))
    assert entries[-1].full_caption() == "parrot, twemoji style"


def small_vae(channels=5):
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        layers_per_block=1, latent_channels=channels, norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip


def test_standardised_latents_have_unit_variance_and_decode_as_before():
    vae = small_vae()
    images = torch.randint(0, 255, (24, 3, 16, 16), dtype=torch.uint8)
    mean, _ = latents.posteriors(vae, images)
    with torch.no_grad():  # two channels are noise: a large log variance, and zero weights in the decoder
        vae.quant_conv.bias[5 + 1] += 30
        vae.quant_conv.bias[5 + 3] += 30
        vae.post_quant_conv.weight[:, [1, 3]] = 0
        vae.post_quant_conv.bias.zero_()
        for c in (0, 2, 4):
            vae.quant_conv.bias[5 + c] += 2 * mean[:, c].std().log() - 6
    standard = latents.standardise(vae, images)
    assert standard.config.latent_channels == 3
    z, _ = latents.posteriors(standard, images)
    assert z.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(z.var(dim=(0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    with torch.no_grad():
        x = train_vae.to_model(images)
        before = vae.decode(vae.encode(x).latent_dist.mode()).sample
        after = standard.decode(standard.encode(x).latent_dist.mode()).sample
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)


def test_newton_schulz_makes_all_singular_values_about_one(g):
    for shape in ((20, 50), (50, 20)):
        s = torch.linalg.svdvals(muon.orthogonalise(torch.randn(shape, generator=g)))
        assert 0.6 < s.min() <= s.max() < 1.3


def test_the_rate_warms_up_stays_and_falls():
    rate = [loop.rate(s, 1000, 1.0, 0.4, warmup=100) for s in range(1000)]
    assert rate[0] == pytest.approx(0.01)
    assert rate[100] == rate[599] == 1
    assert rate[800] == pytest.approx(0.5, abs=0.01)
    assert rate[-1] < 1e-4


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one(kind, tmp_path):
    def train(folder, stops):
        for stop in stops:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            optimizer = muon.MuonAdamW(model, lr=1e-2) if kind == "muon" else None
            run = loop.Run(model, folder, 20, 1e-2, 0.9, 0, falling=0.4, optimizer=optimizer)
            while run.step < stop:
                x = torch.randn(8, 4, generator=run.generator(run.step))
                run.update(run.model(x).square().mean())
            run.save()
        return run

    once, resumed = train(tmp_path / "a", [20]), train(tmp_path / "b", [7, 13, 20])
    for a, b in ((once.model, resumed.model), (once.ema, resumed.ema)):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q)
