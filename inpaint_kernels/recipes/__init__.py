"""How published modules are recognised, and what computes the same faster; one file per op."""
