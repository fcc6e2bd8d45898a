"""Faults of ``tnkfac/einsum``."""

from fault import Fault

FAULTS: tuple[Fault, ...] = (
    # --- geometry
    Fault(
        "einsum/geometry.py",
        "self.kernel_size <= self.stride // common or",
        "self.kernel_size <= self.stride or",
        "overlapping windows pass for disjoint ones where stride and dilation share a factor",
    ),
    Fault(
        "einsum/geometry.py",
        "return total // 2, total - total // 2",
        "return total - total // 2, total // 2",
        "the odd zero of 'same' goes to the left",
    ),
    Fault(
        "einsum/geometry.py",
        "first = -self.left % step",
        "first = self.left % step",
        "sign of the padding in the first pixel that is met",
    ),
    Fault(
        "einsum/geometry.py",
        "left = (self.left + first) // step",
        "left = self.left // step",
        "padding of the coarse axis is one too small",
    ),
    Fault(
        "einsum/geometry.py",
        "end = stride * (self.output_size - 1) + dilation * (self.kernel_size - 1) + 1 - left",
        "end = stride * (self.output_size - 1) + dilation * (self.kernel_size - 1) - left",
        "end of the coarse axis is off by one",
    ),
    Fault(
        "einsum/geometry.py",
        "dilation * (kernel_size - 1) + 1 + output_padding\n",
        "dilation * (kernel_size - 1) + 1\n",
        "output padding is forgotten",
    ),
    # --- rules
    Fault(
        "einsum/rules.py",
        "if len(differ) > 1:",
        "if len(differ) > 2:",
        "patterns that share one leg are joined",
    ),
    Fault(
        "einsum/rules.py",
        "scale *= delta.source.size",
        "scale *= 1",
        "the trace of a delta is lost",
    ),
    Fault(
        "einsum/rules.py",
        "network.scale * ones.source.size",
        "network.scale",
        "the sum of ones is lost",
    ),
    Fault(
        "einsum/rules.py",
        "if not axis.is_unpadded and (twins or pixels in network.output.legs):",
        "if not axis.is_unpadded and pixels in network.output.legs:",
        "deltas in the place of a second pattern count taps on padding",
    ),
    Fault(
        "einsum/rules.py",
        "if axis is None or not axis.is_unpadded:\n            continue\n        k, o, pixels",
        "if axis is None:\n            continue\n        k, o, pixels",
        "taps on padding are counted in sums over pixels",
    ),
    Fault(
        "einsum/rules.py",
        "return op.legs.index(b) == op.legs.index(a) + 1",
        "return op.legs.index(b) > op.legs.index(a)",
        "legs are merged that do not stand side by side",
    ),
    Fault(
        "einsum/rules.py",
        "if pixels in output.legs and {k, o} & {*output.legs}:",
        "if pixels in output.legs and {k, o} <= {*output.legs}:",
        "a result gets one leg twice where only one of tap and position is open",
    ),
    # --- networks
    Fault(
        "einsum/network.py",
        "self.scale**2",
        "self.scale",
        "a doubled network keeps its scale",
    ),
    Fault(
        "einsum/network.py",
        "self.scale * inner.scale",
        "self.scale",
        "composition forgets the scale of the inner network",
    ),
    Fault(
        "einsum/network.py",
        "shift = len(self.output.legs)",
        "shift = len(self.output.shape)",
        "the view of a Jacobian is shifted by axes, not by legs",
    ),
    Fault(
        "einsum/network.py",
        "doubled = [leg for leg in gone.legs if leg in self.output.legs]",
        "doubled = [leg for leg in gone.legs if leg in self.output.legs][:1]",
        "only one of the shared legs of a Jacobian is doubled",
    ),
    Fault(
        "einsum/network.py",
        'names = fresh_names(inner.sizes, "°", self.sizes | inner.sizes)',
        'names = fresh_names(inner.sizes, "°", inner.sizes)',
        "legs of composed networks may get a name that is taken",
    ),
    Fault(
        "einsum/legs.py",
        "        while new in used:\n            new += mark\n",
        "",
        "fresh names may be in use",
    ),
    # --- programs and plans
    Fault(
        "einsum/program.py",
        "return packed, order, tuple(right[left.index(leg)] for leg in order)",
        "return packed, order, right",
        "a packed value is read in its old layout",
    ),
    Fault(
        "einsum/program.py",
        "if n == 1 and slot in",
        "if n >= 1 and slot in",
        "the scale is put on a value that enters twice",
    ),
    Fault(
        "einsum/program.py",
        "key = (operand.source, operand.shape, operand.view)",
        "key = (operand.source, operand.shape)",
        "two views of one tensor get one slot",
    ),
    Fault(
        "einsum/program.py",
        "last.get(s, len(steps)) > index}",
        "last.get(s, len(steps)) > index + 1}",
        "peak memory drops values one step early",
    ),
    Fault(
        "einsum/plans.py",
        "exact = exact and (pattern.stride == pattern.kernel_size or pattern.output_size == 1)",
        "exact = exact or pattern.output_size == 1",
        "interleaved windows pass for tiles",
    ),
    Fault(
        "einsum/plans.py",
        "values = self._constants.get((dtype, device))",
        "values = next(iter(self._constants.values()), None)",
        "constants of another dtype are taken",
    ),
    Fault(
        "einsum/plans.py",
        "return result if self.flops else result.clone()",
        "return result",
        "a result shares memory with an argument",
    ),
    Fault(
        "einsum/plans.py",
        "target = pixels.narrow(axis, pattern.dilation * k, span)",
        "target = pixels.narrow(axis, k, span)",
        "folding forgets the dilation",
    ),
    Fault(
        "einsum/plans.py",
        "order = [right.index(letter) for letter in left]",
        "order = list(range(len(right)))",
        "an elementwise product ignores the order of legs",
    ),
    Fault(
        "einsum/plans.py",
        "values[self._scaled_slot] = values[self._scaled_slot] * self._scale",
        "values[self._scaled_slot] = values[self._scaled_slot]",
        "a constant is not scaled",
    ),
    Fault(
        "einsum/functional.py",
        'if type(options.get("groups", 1)) is not int:',
        "if False:",
        "groups=True finds the plan of groups=1",
    ),
    # --- operations
    Fault(
        "einsum/operations/space.py",
        'channels = "(g ci) co" if self.transposed else "(g co) ci"',
        'channels = "(ci g) co" if self.transposed else "(g co) ci"',
        "channels of a transposed weight are interleaved with groups",
    ),
    Fault(
        "einsum/operations/forward.py",
        "scale /= axis.kernel_size",
        "scale /= axis.output_size",
        "average pooling divides by positions",
    ),
    Fault(
        "einsum/operations/kronecker_factors.py",
        "features, positions = _legs(space)\n"
        '    gram = rows(space, x).gram({"n", "g", *positions}, rows=[features], keep=[("g",)])\n'
        "    return gram.scaled(1 / (max(x[0], 1) * prod(space.output_size)))",
        "features, positions = _legs(space)\n"
        '    gram = rows(space, x).gram({"n", "g", *positions}, rows=[features], keep=[("g",)])\n'
        "    return gram.scaled(1 / max(x[0], 1))",
        "the expand factor is a sum over positions",
    ),
    Fault(
        "einsum/operations/kronecker_factors.py",
        'arranged(("n",), ("g",), features).scaled(1 / prod(space.output_size))',
        'arranged(("n",), ("g",), features)',
        "the reduce factor takes sums for means",
    ),
    Fault(
        "einsum/operations/kronecker_factors.py",
        "    return gram.scaled(1 / max(v[0], 1))",
        "    return gram",
        "the gradient factor is a sum over samples",
    ),
    Fault(
        "einsum/operations/ggn.py",
        'rows=[("ci", *taps)], keep=[("g", "co")]',
        'rows=[("ci", *taps)], keep=[("co", "g")]',
        "blocks of output channels are in another order",
    ),
    Fault(
        "einsum/operations/ggn.py",
        'gram({*first, *second, *taps}, rows=[("c", "n")])',
        'gram({*first, *second, *taps}, rows=[("n", "c")])',
        "the Gram matrix is sample-major",
    ),
    Fault(
        "einsum/operations/ggn.py",
        '    if per_sample:\n        keep.insert(0, ["n"])',
        '    if per_sample:\n        keep.append(["n"])',
        "samples are the last axis of their diagonals",
    ),
    Fault(
        "einsum/operations/ggn.py",
        'return _bias("bias_ggn_diagonal", s).gram({"c", "n", "co"}, keep=[("co",)])',
        'return _bias("bias_ggn_diagonal", s).gram({"c", "co"}, keep=[("co",)])',
        "samples meet each other in the diagonal of a bias",
    ),
    Fault(
        "einsum/operations/hessian.py",
        "    squared = matrix.doubled(matrix.output.legs)\n",
        "    squared = matrix\n",
        "the Hessian diagonal of inputs does not square the weight",
    ),
    Fault(
        "einsum/operations/derivatives.py",
        'equation = f"n (g ci) {{x}}, {{p}}, {lead}n (g co) {{y}} -> {lead}n {{w}}"',
        'equation = f"n (g ci) {{x}}, {{p}}, {lead}n (g co) {{y}} -> n {lead}{{w}}"',
        "samples stand in front of the leading axes",
    ),
    # --- sampled backpropagation
    Fault(
        "einsum/crs/samples.py",
        "1 / prod(p for _, _, p in legs)",
        "1.0",
        "the estimate is not rescaled",
    ),
    Fault(
        "einsum/crs/samples.py",
        "met = axis.stride * outputs - both",
        "met = axis.stride * outputs",
        "padding is forgotten where kernels have one tap",
    ),
    Fault(
        "einsum/crs/samples.py",
        "root = 1 / len(axes)",
        "root = 1",
        "the joint fraction of space is applied to every axis",
    ),
    Fault(
        "einsum/crs/samples.py",
        "start = axis.left - both",
        "start = 0",
        "kept pixels do not start behind the padding on the left",
    ),
    Fault(
        "einsum/crs/gradients.py",
        "rows = (live[:, None] * per_group",
        "rows = (owner.unique()[:, None] * per_group",
        "gradients of groups that were dropped are taken for those that are left",
    ),
    Fault(
        "einsum/crs/modules.py",
        "if not (module.training and self._keep):",
        "if not self._keep:",
        "evaluation is randomised",
    ),
    Fault(
        "einsum/crs/sampled_convolution.py",
        "sample = _pending.get(call)",
        "sample = None",
        "checkpointing draws other masks when it recomputes",
    ),
    Fault(
        "einsum/crs/sampled_convolution.py",
        "        numbers = uniform(count, x.device, None)\n"
        "        if differentiable:\n"
        "            sample",
        "        if differentiable:\n"
        "            numbers = uniform(count, x.device, None)\n"
        "            sample",
        "the generator is left elsewhere by a call without gradients",
    ),
    # --- drawing
    Fault(
        "einsum/drawing/layout.py",
        "cells[self.mirror[v]] = (-cell[0], cell[1])",
        "cells[self.mirror[v]] = (-cell[0], cell[1] + 1)",
        "mirrored nodes are not level",
    ),
)
