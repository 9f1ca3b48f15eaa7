"""The scores as ``torchmetrics.Metric`` classes: ``update`` with batches, ``compute`` once.

States are sums of feature products, so results do not depend on batches, order or the number of processes, and memory
does not grow with the number of samples.
"""

from kspec_guidance.metrics.conditional import ConditionalRKEScore, ConditionalVendiScore, InformationVendiScore
from kspec_guidance.metrics.discrepancy import MMDScore
from kspec_guidance.metrics.novelty import KENScore
from kspec_guidance.metrics.scendi import ScendiScore
from kspec_guidance.metrics.vendi import RKEScore, VendiScore

__all__ = [
    "VendiScore",
    "RKEScore",
    "ConditionalVendiScore",
    "InformationVendiScore",
    "ConditionalRKEScore",
    "ScendiScore",
    "KENScore",
    "MMDScore",
]
