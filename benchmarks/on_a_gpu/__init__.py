"""What only a GPU can show, in ten minutes on a bare machine; `python -m benchmarks.on_a_gpu`."""
