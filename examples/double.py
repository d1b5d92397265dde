"""Double twenty numbers, in order.

python examples/double.py                  # on worker processes of this machine
mpirun -n 3 python examples/double.py      # on the other ranks
"""

import taskgrad as tg


def compute(x):
    return 2 * x


if tg.main(__name__):
    for y in tg.imap(compute, range(20)):
        print(y)
