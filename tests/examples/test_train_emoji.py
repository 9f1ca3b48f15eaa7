"""The training code of the embedded pipeline: captions with known modes, latents without inactive channels, resumption."""

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "train_emoji"))
import batches
import captions
import continue_on_gpu
import data
import distil_transformer
import export_transformer
import latents
import loop
import muon
import train_transformer
import train_vae
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from benchmarks.arena.networks import emoji_transformer, emoji_transformer_pipeline
from kspec_guidance import load_demo_pipeline

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


def test_packed_pictures_come_back(tmp_path, g, monkeypatch):
    entries = (captions.build_entries(TABLE) * 2)[:11]
    images = torch.randint(0, 255, (11, 3, 64, 64), dtype=torch.uint8, generator=g)
    monkeypatch.setattr(data, "download", lambda folder: None)
    monkeypatch.setattr(data, "load", lambda folder: (images, entries))
    monkeypatch.setattr(continue_on_gpu, "SHEET", 8)
    continue_on_gpu.pack(tmp_path, tmp_path / "packed")
    back, same = continue_on_gpu.unpack(tmp_path / "packed")
    assert torch.equal(back, images)
    assert same == entries


def test_steps_by_the_clock_lower_the_loss_of_the_average(g, capsys):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4), torch.randn(64, 4, generator=g)
    steps = continue_on_gpu.Steps(model, lambda: (model(x) - x).square().mean(), muon.MuonAdamW(model, lr=0.0), 0.9)
    error = lambda: float((steps.average(x) - x).square().mean())  # noqa: E731
    before = error()
    assert steps.train(0.3, 1e-2, lambda: "checked") >= continue_on_gpu.BURST
    assert error() < before
    assert "checked" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pipe():
    return emoji_transformer_pipeline(emoji_transformer(width=16, layers=2))


def test_a_transformer_trains_resumes_and_makes_images_after_export(pipe, tmp_path, g, monkeypatch):
    text, transformer = train_transformer.TextStates(pipe), emoji_transformer(width=16, layers=2)
    entries, clean = captions.build_entries(TABLE), torch.randn(8, 9, 8, 8, generator=g)

    def loss(batch):
        return train_transformer.flow_loss(transformer, batch, text(batch.captions))

    for steps in (1, 2):
        optimizer = muon.MuonAdamW(transformer, 1e-2, ends=train_transformer.ENDS)
        run = loop.Run(transformer, tmp_path, steps, 1e-2, 0.9, 0, optimizer=optimizer)
        assert run.step == steps - 1
        run.train(loss, batches.Batches(clean, (entries * 2)[:8], 4, 0))
    averaged = loop.averaged(tmp_path)
    file = tmp_path / "exported" / "tiny.safetensors"
    monkeypatch.setattr(sys, "argv", ["export", "--run", str(tmp_path), "--out", str(file)])
    export_transformer.main()
    again = emoji_transformer(width=16, layers=2)
    again.load_state_dict({k: v.float() for k, v in load_file(file).items()})
    for k, v in again.state_dict().items():
        torch.testing.assert_close(v, averaged[k], atol=1e-3, rtol=1e-3)
    monkeypatch.setattr(pipe, "transformer", again)
    image = pipe("parrot", num_inference_steps=2, max_sequence_length=0, output_type="pt").images
    assert image.shape == (1, 3, 64, 64)


def test_matrices_of_all_blocks_are_trained_by_muon_and_the_ends_by_adam(pipe):
    optimizer = muon.MuonAdamW(pipe.transformer, 1e-2, ends=train_transformer.ENDS)
    by_muon = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    names = {n for n, p in pipe.transformer.named_parameters() if id(p) in by_muon}
    blocks = {n for n, p in pipe.transformer.named_parameters() if n.startswith("transformer_blocks") and p.ndim == 2}
    assert names == blocks | {"norm_out.linear.weight", "time_text_embed.text_embedder.linear_2.weight"}


def test_the_text_states_are_those_of_the_embedded_encoder(pipe):
    demo = load_demo_pipeline()
    tokens = demo.tokenizer(["runner"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        known = demo.text_encoder(tokens, output_hidden_states=True)
    text = train_transformer.TextStates(pipe)
    for _ in range(2):
        states = text(["heart", "runner"])
        torch.testing.assert_close(
            states["encoder_hidden_states"][1], known.hidden_states[-2][0].repeat(1, 2) / 8, atol=1e-2, rtol=1e-3
        )
        torch.testing.assert_close(states["pooled_projections"][1], known.pooler_output[0].repeat(2), atol=1e-3, rtol=1e-3)
    assert list(text.known) == ["heart", "runner"]


def test_noise_levels_stay_inside_and_are_shifted_as_the_scheduler_does(pipe):
    s = train_transformer.noise_levels(torch.tensor([0.0, 0.5, 1.0]))
    assert 0 < s[0] < s[1] < s[2] < 1
    u = torch.linspace(1, 0.25, 4)
    pipe.scheduler.set_timesteps(sigmas=u.tolist())
    torch.testing.assert_close(train_transformer.shifted(u), pipe.scheduler.sigmas[:-1])


@pytest.mark.parametrize(("scale", "each"), [(1.0, 1), (3.0, 2)])
def test_a_trajectory_ends_where_the_pipeline_does(scale, each, pipe, g, monkeypatch):
    """And with one step of the teacher for one of the student, without guidance, the teacher is its own perfect student."""
    torch.manual_seed(0)
    teacher = emoji_transformer(width=16, layers=2)
    monkeypatch.setattr(pipe, "transformer", teacher)
    text, noise = train_transformer.TextStates(pipe), torch.randn(2, 9, 8, 8, generator=g)
    states, empty = text(["parrot"] * 2), text([""] * 2)
    levels, visited = distil_transformer.trajectory(teacher, noise, states, empty, each, scale)
    count = distil_transformer.STEPS * each
    made = pipe(
        "parrot", num_images_per_prompt=2, latents=noise, sigmas=[1 - k / count for k in range(count)],
        guidance_scale=scale, max_sequence_length=0, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(visited[-1], made, atol=1e-2, rtol=1e-2)
    loss = distil_transformer.step_loss(teacher, levels, visited, states)
    assert (loss < 1e-8) == (scale == 1)
