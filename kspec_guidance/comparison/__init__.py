"""Comparisons of models and of embeddings: where two differ, what one sees that the other does not, how to combine them."""

from kspec_guidance.comparison.alignment import KernelAlignmentLoss, LinearAlignment, align_linear
from kspec_guidance.comparison.bias import DiversityGap, ScoreGap, diversity_gap
from kspec_guidance.comparison.clients import ClientMessage, ClientScores, fid_over_clients, kid_over_clients
from kspec_guidance.comparison.completion import complete_kernel
from kspec_guidance.comparison.contrast import Koda, koda
from kspec_guidance.comparison.difference import Spec, spec
from kspec_guidance.comparison.disagreement import PromptSplit, prompt_split
from kspec_guidance.comparison.mixtures import EntropyMixture, max_entropy_mixture, max_entropy_weights
from kspec_guidance.comparison.products import ProductEmbedder, product_embedder
from kspec_guidance.comparison.projection import entropy_projection

__all__ = [
    "PromptSplit",
    "prompt_split",
    "Koda",
    "koda",
    "Spec",
    "spec",
    "ProductEmbedder",
    "product_embedder",
    "EntropyMixture",
    "max_entropy_mixture",
    "max_entropy_weights",
    "complete_kernel",
    "LinearAlignment",
    "align_linear",
    "KernelAlignmentLoss",
    "ClientMessage",
    "ClientScores",
    "kid_over_clients",
    "fid_over_clients",
    "DiversityGap",
    "ScoreGap",
    "diversity_gap",
    "entropy_projection",
]
