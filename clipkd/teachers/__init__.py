"""Frozen teachers: loaded models, or their features from a cache."""
