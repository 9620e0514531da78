"""A question is read once, thoughts are appended, text comes out."""
