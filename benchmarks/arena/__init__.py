"""The arena: every published training-free diversity method beside ours, on beds whose truth is known.

python -m benchmarks.arena --help        # from the root of the repository
"""
