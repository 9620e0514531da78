"""Accuracy of a trained model, and tests of whether its thoughts do anything."""
