"""Everything train.py needs besides the model."""
