"""Inference: prefill a question, append thoughts, generate tokens."""
