"""The instrument behind ``pytest --benchmark``: what is measured, how, and how it is shown.

| file            | what lives there                                                              |
|-----------------|-------------------------------------------------------------------------------|
| `formulas.py`   | the losses as users of plain PyTorch write them                               |
| `cases.py`      | shapes, and one `Case` a group of rows that are measured together             |
| `rows.py`       | the rows of a case: floor, eager, compiled, backends; their inputs and checks |
| `step.py`       | the whole training step, a group like the others                              |
| `methods.py`    | the losses of the other methods, beside their `published.py` forms            |
| `method_steps.py`| whole training steps of those methods, published and ours                    |
| `loops.py`      | whole training loops: `fastkd.training` beside a toolkit's                    |
| `toolkit.py`    | that loop, as toolkits write it                                               |
| `gpu.py`        | the losses on a GPU, by three clocks: groups added where there is one         |
| `gpu_clock.py`  | the clocks of a GPU                                                           |
| `gpu_device.py` | where the parts of `benchmarks/gpu.py` run, and where they write              |
| `gpu_plan.py`   | what `benchmarks/gpu.py` runs; `gpu_parts.py`, `gpu_tiles.py`: its processes  |
| `gpu_run.py`    | how it runs them; `gpu_files.py`, `gpu_summary.py`: what it leaves            |
| `gpu_ahead.py`  | Triton's kernels of those processes, compiled without a GPU; `gpu_ahead_tests.py`|
| `gpu_step.py`   | steps of ResNet-50 and ResNet-20 on a GPU                                     |
| `measure.py`    | interleaved rounds, peak memory                                               |
| `quiet.py`      | whether the machine was quiet enough to judge a goal                          |
| `stock.py`      | eager under the stock allocator, in a process of its own                      |
| `session.py`    | one run: groups measured when first asked for, rows handed to pytest-benchmark|
| `goals.py`      | the goals, and in `verdicts.py` geometric means against them                  |
| `table.py`      | the table at the end                                                          |
| `figure.py`     | the table and the figure of docs/speed.md                                     |
| `against.py`    | the host's time of a call in two trees                                        |
| `machine.py`    | what ran it                                                                   |
| `plugin.py`     | the options, and the hooks of pytest; `stand_in.py` for pytest-benchmark      |
"""
