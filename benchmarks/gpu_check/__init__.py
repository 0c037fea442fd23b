"""Everything that needs a GPU, in one command: `make gpu-check`.

| file | holds |
|---|---|
| `stages.py` | what is done, and how long it may take |
| `build.py`, `selftest.cpp`, `problem.h`, `exports.cpp` | the kernels against the CPU build, without torch |
| `tune.py` | the choices of csrc/cuda made otherwise, timed side by side |
| `torch_checks.py` | steps as a user of torch sees them |
| `tests_by_file.py` | the tests marked `cuda`, a process per file |
| `processes.py` | commands that end in time, with all that they have started |
| `results.py` | the files that are kept |
"""
