"""minitorch's scalar functions, each beside torch's own form, for the tests of kernels."""

from __future__ import annotations

import math

import torch


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def relu(x):
    return x if x > 0 else 0.0


ONE = {
    "neg": (lambda a: -a, torch.neg),
    "add_constant": (lambda a: 5 + a, lambda a: 5 + a),
    "square": (lambda a: a * a, torch.square),
    "cube": (lambda a: a * a * a, lambda a: a * a * a),
    "sub_constant": (lambda a: a - 5, lambda a: a - 5),
    "mult_constant": (lambda a: 5 * a, lambda a: 5 * a),
    "div": (lambda a: a / 5, lambda a: a / 5),
    "inv": (lambda a: 1 / (a + 3.5), lambda a: 1 / (a + 3.5)),
    "sig": (sigmoid, torch.sigmoid),
    "log": (lambda a: math.log(a + 100000), lambda a: torch.log(a + 100000)),
    "relu": (lambda a: relu(a + 5.5), lambda a: torch.relu(a + 5.5)),
    "exp": (lambda a: math.exp(a - 200), lambda a: torch.exp(a - 200)),
    "explog": (
        lambda a: math.log(a + 100000) + math.exp(a - 200),
        lambda a: torch.log(a + 100000) + torch.exp(a - 200),
    ),
}
TWO = {
    "add2": (lambda a, b: a + b, torch.add),
    "mul2": (lambda a, b: a * b, torch.mul),
    "div2": (lambda a, b: a / (b + 5.5), lambda a, b: a / (b + 5.5)),
    "gt2": (lambda a, b: 1.0 if a + 1.2 > b else 0.0, lambda a, b: (a + 1.2 > b).to(a.dtype)),
    "lt2": (lambda a, b: 1.0 if a + 1.2 < b else 0.0, lambda a, b: (a + 1.2 < b).to(a.dtype)),
    "eq2": (lambda a, b: 1.0 if a == b + 5.5 else 0.0, lambda a, b: (a == b + 5.5).to(a.dtype)),
}
