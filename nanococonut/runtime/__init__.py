"""Command line, devices, processes, CUDA graphs and errors."""
