"""What taskgrad costs and what it saves, measured on your machine: ``python -m benchmarks``.

Each module is one benchmark and runs alone, too: ``python -m benchmarks.hop --json hop.json``.
It measures taskgrad and its rival in turns within one run, because a machine's speed drifts by more
than what is to be seen, and it reports ratios, because seconds say more about the machine.
"""
