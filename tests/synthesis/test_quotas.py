import pytest
import torch
from PIL import Image

from kspec_guidance import load_demo_reference
from kspec_guidance.loop.latents import encode_reference
from kspec_guidance.objectives import Balance
from kspec_guidance.synthesis import Attribute, Prompt, SynthesisError
from kspec_guidance.synthesis.quotas import allot, read_attribute
from tests.synthesis.small_runs import make, rows_of


def test_quotas_by_group(tmp_path, pipe):
    prompts = [Prompt("heart", "a"), Prompt("red heart", "a"), Prompt("man", "b"), Prompt("runner")]
    result = make(tmp_path, pipe, prompts, images_per_prompt=2, quotas={"a": 5, "b": 3})
    assert result.images == 10
    counts = [sum(r["prompt"] == p.text for r in rows_of(tmp_path)) for p in prompts]
    assert counts == [3, 2, 3, 2]


@pytest.mark.slow
def test_attributes_have_about_the_wanted_shares(tmp_path, pipe):
    call = {"num_inference_steps": 10, "guidance_scale": 5.0}
    dark, light = (encode_reference(pipe, load_demo_reference(f"{n}-skin-tone")) for n in ("dark", "light"))
    quotas = {"dark": Attribute(dark, 3.0), "light": Attribute(light, 1.0)}
    prompts = ["man", "farmer", "student", "health worker"]
    result = make(tmp_path / "a", pipe, prompts, images_per_prompt=8, batch_size=8, call=call, quotas=quotas)
    assert sum(result.attributes.values()) == 32
    assert 20 <= result.attributes["dark"] <= 28  # 24 wanted
    with pytest.raises(SynthesisError, match="two reference sets or more"):
        make(tmp_path / "b", pipe, quotas={"dark": Attribute(dark)})
    with pytest.raises(SynthesisError, match="encode the references"):
        make(tmp_path / "b", pipe, quotas={"x": Attribute(torch.ones(3, 5)), "y": Attribute(torch.zeros(3, 5))})
    with pytest.raises(SynthesisError, match="a number of images or an Attribute"):
        make(tmp_path / "b", pipe, quotas={"x": "many"})


def test_attributes_are_read_from_folders_and_by_name(tmp_path, pipe):
    images = load_demo_reference("dark-skin-tone")[:4]
    (tmp_path / "dark" / "more").mkdir(parents=True)
    for k, image in enumerate(images):
        pixels = ((image / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "dark" / ("more" if k % 2 else ".") / f"{k}.png")
    found = read_attribute(pipe, f"{tmp_path / 'dark'}:0.25")
    assert found.share == 0.25
    order = [0, 2, 1, 3]  # files of the folder, then of its subfolders
    torch.testing.assert_close(found.reference, encode_reference(pipe, images)[order], rtol=1e-3, atol=0.05)
    named = read_attribute(pipe, "light-skin-tone")
    torch.testing.assert_close(named.reference, encode_reference(pipe, load_demo_reference("light-skin-tone")))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_text("no image")
    for source, message in (
        ("nothing", "no reference set named"),
        ("empty", "contains no images"),
        ("broken", "cannot read"),
    ):
        with pytest.raises(SynthesisError, match=message):
            read_attribute(pipe, str(tmp_path / source) if (tmp_path / source).exists() else source)


def test_the_balance_objective_is_the_gradient_of_its_value(g):
    references = [torch.randn(5, 6, generator=g).double() + 1, torch.randn(7, 6, generator=g).double() - 1]
    objective = Balance(references)
    objective.wanted = [0, 1, 1, 0]
    x = torch.randn(4, 6, generator=g).double().requires_grad_()
    (expected,) = torch.autograd.grad(objective.value(x), x)
    torch.testing.assert_close(objective.gradient(x.detach()).rows, expected)
    assert objective.assign(torch.cat(references)) == [0] * 5 + [1] * 7
    assert allot([10, 0], [1, 1], 4) == [1] * 4
    assert allot([0, 0, 0], [2, 1, 1], 8).count(0) == 4
