"""The machine: command line, devices, processes, CUDA graphs, errors."""
