"""Randomised backpropagation: convolutions that keep only a sample of their input.

The weight gradient is linear in the input and in the output gradient, so it stays unbiased when
whole slices of a leg of its network are dropped at random and the others are scaled up: with
independent ``z_l ~ Bernoulli(p)`` per value ``l`` of the leg, ``E[z_l / p] = 1``. This is
Bernoulli column-row sampling (Adelman et al., arXiv 1805.08079), here along the legs of a
convolution (arXiv 2307.02275, section on randomised backpropagation). Between the forward and the
backward pass only the kept slices of the input are stored, and the lists of their indices.

What the backward pass does with them: a leg that both operands share (samples, and the axes of
one-tap kernels) and the input channels are sliced on both sides, so the arithmetic shrinks with the
storage. Along an axis with several taps, the kept pixels are put back between zeros first, and
dropped again after the one call of torch's own weight gradient. Contracting with sliced index
patterns instead, tap by tap, needs fewer multiplications, but copies both operands once per tap; on
a CPU it was no faster on the whole for dense layers, and many times slower for channel groups. What
is saved is memory, not time: the gradients of input and weight are two calls, where the ordinary
backward pass makes one.
"""

from tnkfac.einsum.crs.modules import Handle, apply
from tnkfac.einsum.crs.sampled_convolution import conv

__all__ = ["Handle", "apply", "conv"]
