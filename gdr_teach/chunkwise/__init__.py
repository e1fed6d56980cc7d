"""The rule-free machinery of the chunk form: inverse, prepare, scan, gradients (chapters 6 to 9); begin with `wy`."""
