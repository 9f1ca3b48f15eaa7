"""Every score as a pure function of tensors, differentiable in the samples.

Samples are rows ``x`` ``[..., n, d]`` and their prompts rows ``prompt_features`` ``[..., n, p]``; leading dimensions are
batches. Results are float64 ``[...]``: scores (effective numbers of modes), or nats where the name says entropy.

Samples may be on any device and in any floating-point type. Everything is computed in float64 on the host, since not every
device has float64, and results are there; gradients flow back to the samples. A ``feature_map`` is called with float32 (or
float64) rows on the device of the samples.
"""

from kspec_guidance.functional.clusters import effective_number, kind_labels, kinds, kinds_score
from kspec_guidance.functional.conditional import (
    conditional_entropy,
    conditional_rke_score,
    conditional_vendi_score,
    information_vendi_score,
)
from kspec_guidance.functional.discrepancy import cmmd, kid, mmd
from kspec_guidance.functional.fidelity import (
    FidelityScores,
    NeighbourScores,
    fidelity_scores,
    frechet_distance,
    neighbour_scores,
    precision_score,
)
from kspec_guidance.functional.modes import Mode, novel_modes, top_modes
from kspec_guidance.functional.novelty import conditional_ken_score, ken_score, relative_rke_score
from kspec_guidance.functional.scendi import prompt_vendi_score, remove_prompt, scendi_matrices, scendi_score
from kspec_guidance.functional.simplex import SimplexSolution, minimise_on_simplex
from kspec_guidance.functional.vendi import kernel_entropy, matrix_vendi_score, mean_cosine, rke_score, vendi_score

__all__ = [
    "vendi_score",
    "matrix_vendi_score",
    "rke_score",
    "kernel_entropy",
    "mean_cosine",
    "conditional_vendi_score",
    "information_vendi_score",
    "conditional_rke_score",
    "conditional_entropy",
    "scendi_score",
    "prompt_vendi_score",
    "scendi_matrices",
    "remove_prompt",
    "ken_score",
    "conditional_ken_score",
    "relative_rke_score",
    "mmd",
    "kid",
    "cmmd",
    "kinds_score",
    "kinds",
    "kind_labels",
    "effective_number",
    "Mode",
    "top_modes",
    "novel_modes",
    "FidelityScores",
    "fidelity_scores",
    "NeighbourScores",
    "neighbour_scores",
    "frechet_distance",
    "precision_score",
    "SimplexSolution",
    "minimise_on_simplex",
]
