"""Interface to diffusers denoising loops: schedulers, sample layouts, hooks and call contexts.

It does not depend on kernels, objectives or memories.
"""
