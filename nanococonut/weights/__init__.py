"""Model weights in and out."""
