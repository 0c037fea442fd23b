"""The CUDA backend on the CPU: the sources of csrc/cuda, compiled by g++ against a stand-in for the runtime."""
