"""What train.py needs in addition to the model."""
