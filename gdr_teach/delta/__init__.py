"""Chapter 2, the delta rule: `reference` in plain PyTorch, `recurrent` in Triton, `op` for users."""
