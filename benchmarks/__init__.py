"""Benchmarks: `python -m benchmarks` times optimizer steps against other optimizers and against the machine's memory.

| file | holds |
|---|---|
| `shapes.py` | the parameter lists of real models |
| `cases.py` | what is measured: formats, sizes, models, groups |
| `peers.py` | who is measured: one function per optimizer that prepares its step |
| `roof.py`, `stream.cpp` | what the memory can do: a copy on a GPU, the same reads and writes on a CPU |
| `timing.py` | alternation, flushed caches, medians and spread |
| `measure.py`, `profiled.py` | one case: sets up its peers, times them, computes the rest; what the profiler saw |
| `bars.py` | the ratios that must be reached |
| `report.py`, `gpu_json.py`, `names.py`, `nvidia_smi.py` | conditions, JSON, tables, pictures |
| `schedule_time.py` | evaluating schedules alone |
| `gpu_check/` | `make gpu-check`: everything that needs a GPU, in one command |
| `quality.py` | what formats do to the loss of trained models, by itself |
"""
