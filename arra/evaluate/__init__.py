"""Measures of trained models: distances, retrieval, evaluation cards and their comparison."""
