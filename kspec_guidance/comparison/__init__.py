"""Comparisons of models and of embeddings: where two differ, what one sees that the other does not, how to combine them."""
