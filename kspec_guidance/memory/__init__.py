"""Memories of generated samples.

| class | contents | cost per step |
|---|---|---|
| :class:`MemoryBank` | one row per sample | one read of the relevant rows |
| :class:`CentroidMemory` | a fixed number of weighted means of similar samples | constant |
| :class:`RandomFeatureMemory` | one sum of random features | constant |

All are saved as safetensors with a checksum. :func:`choose_memory` selects one by number and size of samples.
"""

from kspec_guidance.memory.bank import MemoryBank
from kspec_guidance.memory.base import Memory
from kspec_guidance.memory.centroids import CentroidMemory
from kspec_guidance.memory.choosing import choose_memory
from kspec_guidance.memory.io import MemoryFileError
from kspec_guidance.memory.random_features import RandomFeatureMemory
from kspec_guidance.memory.selection import PromptWeights, Selection

__all__ = [
    "CentroidMemory",
    "Memory",
    "MemoryBank",
    "MemoryFileError",
    "PromptWeights",
    "RandomFeatureMemory",
    "Selection",
    "choose_memory",
]
