"""What has been generated so far.

=========================  =====================================================  ==================================
class                      what it keeps                                          cost of a step
=========================  =====================================================  ==================================
:class:`MemoryBank`        every sample as a row                                  one read of the rows that matter
:class:`CentroidMemory`    weighted means of near samples, so many and no more    constant
:class:`RandomFeatureMemory`  one sum of random features                          constant
=========================  =====================================================  ==================================

All are saved as safetensors with a checksum. :func:`choose_memory` picks by a stated rule.
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
