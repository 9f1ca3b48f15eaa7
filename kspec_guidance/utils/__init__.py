"""Helpers that know nothing of this package: files, digests, images, progress bars."""
