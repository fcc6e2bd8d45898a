"""From a gradient to a step of its parameter."""
