"""Routes of a Gram matrix: every exact way to compute one, what it costs, and which to take."""
