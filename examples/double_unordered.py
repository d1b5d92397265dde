"""Double an array in ten batches, each put in its place as soon as it is there.

python examples/double_unordered.py
mpirun -n 3 python examples/double_unordered.py
"""

import numpy as np

import taskgrad as tg


def compute(indices, x):
    return indices, 2 * x


if tg.main(__name__):
    x = np.arange(100) * 10
    batches = ((indices, x[indices]) for indices in np.array_split(np.arange(len(x)), 10))
    y = np.zeros_like(x)
    for indices, part in tg.starmap(compute, batches, unordered=True, progress=True):
        y[indices] = part
    print(y)
    assert np.array_equal(y, 2 * x)
