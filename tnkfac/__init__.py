"""Second-order optimizers from tensor networks."""
