"""`tg.map`: a function over many items, differentiable."""
