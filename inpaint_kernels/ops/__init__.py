"""The public ops: one module per op, its contract from docstring to autograd."""
