# Copyright 2026 the kspec-guidance authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with it.
# A copy is at http://www.apache.org/licenses/LICENSE-2.0. The file is distributed "as is", without warranties or
# conditions of any kind.

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.diversity_guidance import DiversityGuidance


class Denoiser(torch.nn.Module):
    def forward(self, hidden_states, encoder_hidden_states):
        return hidden_states - torch.tanh(hidden_states) * (1 + encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None])


class TestDiversityGuidance:
    def get_dummy_inputs(self, batch_size=3):
        generator = torch.Generator("cpu").manual_seed(0)
        latents = torch.randn(batch_size, 4, 4, 4, generator=generator)
        prompt_embeds = torch.randn(1, 5, 8, generator=generator).repeat(batch_size, 1, 1)
        return latents, prompt_embeds, torch.zeros_like(prompt_embeds)

    def predict(self, guider, latents, prompt_embeds, negative_prompt_embeds, step=0, steps=4, timestep=800.0):
        guider.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(timestep))
        batches = guider.prepare_inputs({"encoder_hidden_states": (prompt_embeds, negative_prompt_embeds)})
        denoiser = Denoiser()
        for batch in batches:
            guider.prepare_models(denoiser)
            batch.noise_pred = denoiser(hidden_states=latents, encoder_hidden_states=batch.encoder_hidden_states)
            guider.cleanup_models(denoiser)
        assert not denoiser._forward_pre_hooks
        return guider(batches).pred

    def clean(self, latents, pred, timestep=800.0):
        return latents - timestep / 1000 * pred

    def test_diversity_scale_0_is_cfg(self):
        inputs = self.get_dummy_inputs()
        expected = self.predict(ClassifierFreeGuidance(guidance_scale=3.0), *inputs)
        assert torch.equal(self.predict(DiversityGuidance(guidance_scale=3.0, diversity_scale=0.0), *inputs), expected)

    def test_one_image_is_cfg(self):
        inputs = self.get_dummy_inputs(batch_size=1)
        expected = self.predict(ClassifierFreeGuidance(guidance_scale=3.0), *inputs)
        assert torch.equal(self.predict(DiversityGuidance(guidance_scale=3.0), *inputs), expected)

    def test_clean_predictions_move_apart(self):
        latents, *prompts = self.get_dummy_inputs()
        plain = self.clean(latents, self.predict(ClassifierFreeGuidance(guidance_scale=3.0), latents, *prompts)).flatten(1)
        guider = DiversityGuidance(guidance_scale=3.0, diversity_scale=0.1)
        moved = self.clean(latents, self.predict(guider, latents, *prompts)).flatten(1)
        similarity = torch.nn.functional.cosine_similarity
        pairs = torch.triu_indices(3, 3, 1)
        before, after = (similarity(x[pairs[0]], x[pairs[1]]).mean() for x in (plain, moved))
        assert after < before - 1e-3
        noise = latents.flatten(1) - 0.2 * plain
        assert (similarity(moved - plain, noise).abs() < 1e-4).all()
        assert ((moved.norm(dim=1) / plain.norm(dim=1) - 1).abs() < 0.02).all()

    def test_images_of_unrelated_prompts_are_left_alone(self):
        latents, prompt_embeds, negative_prompt_embeds = self.get_dummy_inputs(batch_size=2)
        prompt_embeds = torch.stack([prompt_embeds[0], -prompt_embeds[0]])
        inputs = latents, prompt_embeds, negative_prompt_embeds
        expected = self.predict(ClassifierFreeGuidance(guidance_scale=3.0), *inputs)
        found = self.predict(DiversityGuidance(guidance_scale=3.0), *inputs)
        assert torch.allclose(found, expected, atol=1e-5)

    def test_interval(self):
        inputs = self.get_dummy_inputs()
        expected = self.predict(ClassifierFreeGuidance(guidance_scale=3.0), *inputs, step=2)
        guider = DiversityGuidance(guidance_scale=3.0, diversity_stop=0.5)
        assert torch.equal(self.predict(guider, *inputs, step=2), expected)
        assert not torch.equal(self.predict(guider, *inputs, step=1), expected)

    def test_disable(self):
        inputs = self.get_dummy_inputs()
        guider = DiversityGuidance()
        guider.disable()
        assert guider.num_conditions == 1
        assert torch.equal(self.predict(guider, *inputs), Denoiser()(inputs[0], inputs[1]))

    def test_save_load(self, tmp_path):
        DiversityGuidance(guidance_scale=3.0, diversity_scale=0.2, bandwidth=0.7).save_pretrained(tmp_path)
        loaded = DiversityGuidance.from_pretrained(tmp_path)
        assert (loaded.guidance_scale, loaded.diversity_scale, loaded.bandwidth) == (3.0, 0.2, 0.7)
        assert loaded.new(diversity_scale=0.5).diversity_scale == 0.5

    def test_half_precision(self):
        inputs = [x.to(torch.bfloat16) for x in self.get_dummy_inputs()]
        pred = self.predict(DiversityGuidance(), *inputs)
        assert pred.dtype == torch.bfloat16
        assert torch.isfinite(pred).all()

    @pytest.mark.parametrize(
        "kwargs", [{"diversity_scale": -1.0}, {"diversity_start": 0.7}, {"diversity_stop": 1.5}, {"bandwidth": 0.0}]
    )
    def test_wrong_settings_raise(self, kwargs):
        with pytest.raises(ValueError, match="Expected"):
            DiversityGuidance(**kwargs)

    def test_latents_of_another_form_raise(self):
        guider = DiversityGuidance(guidance_scale=1.0)
        guider.set_state(step=0, num_inference_steps=4, timestep=torch.tensor(800.0))
        (batch,) = guider.prepare_inputs({"encoder_hidden_states": (torch.zeros(2, 5, 8), None)})
        batch.noise_pred = torch.zeros(2, 4, 4, 4)
        with pytest.raises(ValueError, match="in another form"):
            guider([batch])
