"""Double an array in ten batches: several arguments, and who does what.

python examples/double_batches.py
mpirun -n 3 python examples/double_batches.py
"""

import numpy as np

import taskgrad as tg


def compute(batch, x):
    print(f"batch {batch} on rank {tg.rank()} of {tg.size()}")
    return 2 * x


if tg.main(__name__):
    x = np.arange(100)
    batches = enumerate(np.array_split(x, 10))
    y = np.concatenate(list(tg.starmap(compute, batches)))
    print(y)
    assert np.array_equal(y, 2 * x)
