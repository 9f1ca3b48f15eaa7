"""A diffusers denoising loop as guidance sees it: schedulers, layouts, hooks, and what is known of a call.

Nothing here knows of kernels, objectives or memories.
"""
