"""Whole runs from a model to a model."""
