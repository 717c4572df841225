"""Decoding: models and seeds give codes and images. Nothing here knows about alignment."""
