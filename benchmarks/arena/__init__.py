"""The arena: published training-free diversity methods and ours, on beds with known modes.

python -m benchmarks.arena --help        # from the root of the repository
"""
