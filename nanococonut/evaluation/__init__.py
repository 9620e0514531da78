"""Measures of a trained model's answers."""
