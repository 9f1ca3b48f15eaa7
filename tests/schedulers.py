"""The schedulers that guidance is tested on, with the settings that change their parametrisation."""

import diffusers

VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SETTINGS = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "LCM": ("LCMScheduler", {"original_inference_steps": 50, "clip_sample": False}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "TCD": ("TCDScheduler", {"original_inference_steps": 50, "clip_sample": False}),
}
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


def make(name: str, prediction_type: str = "epsilon"):
    """The scheduler of ``SETTINGS`` with Stable Diffusion's noise schedule."""
    cls, settings = SETTINGS[name]
    return getattr(diffusers, cls)(prediction_type=prediction_type, **VP, **settings)
