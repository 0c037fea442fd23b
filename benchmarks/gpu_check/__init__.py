"""Everything that needs a GPU, in one command: `make gpu-check`. `stages.py` lists what is done, and how long it may
take; `selftest.cpp` compares the kernels with the CPU build, `torch_checks.py` looks at steps as a user of torch does.
"""
