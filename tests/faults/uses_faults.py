"""Faults where weights are captured at the calls that use them."""

from fault import Fault

FAULTS: tuple[Fault, ...] = (
    Fault(
        "curvature/uses/products.py",
        "    return Product(left, right, False, bias)\n",
        "    return Product(left, right, True, bias)\n",
        "addmm takes the weight's rows for outputs",
    ),
    Fault(
        "curvature/uses/products.py",
        "return x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])",
        "return x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])",
        "an einsum of a stack forgets the stack",
    ),
    Fault(
        "curvature/uses/blocks.py",
        "        return Block(offset, columns, rows, right), True",
        "        return Block(offset, columns, rows, right), False",
        "a transposed view is taken as it is",
    ),
    Fault(
        "curvature/uses/matching.py",
        "        if same and same[0].outputs_first != outputs_first:\n"
        "            return weight.refuse(BOTH_WAYS)\n",
        "",
        "uses as W and as its transpose are added up",
    ),
    Fault(
        "curvature/uses/matching.py",
        "        if overlap and not weight.drop_expected():\n"
        "            return weight.refuse(OVERLAPPING)\n",
        "",
        "parts may overlap",
    ),
    Fault(
        "curvature/uses/matching.py",
        "            for slot, _, _ in found:\n                slot.used = True\n",
        "            pass\n",
        "what a pass has used is dropped as expected",
    ),
    Fault(
        "curvature/uses/mode.py",
        "                if hooks is not _saved_tensor_hooks():",
        "                if False:",
        "weights are tapped inside of checkpoints that run without the scope",
    ),
    Fault(
        "curvature/uses/mode.py",
        "sequence_first(rows, samples) if samples else by_sample",
        "by_sample",
        "attention takes positions for samples",
    ),
    Fault(
        "curvature/uses/mode.py",
        "self._traced_views.append((view, known, start + distance))",
        "self._traced_views.append((view, known, distance))",
        "parts of parts are counted from the part in graphs",
    ),
    Fault(
        "curvature/uses/starts.py",
        "        start += piece.shape[axis] * source.stride(axis)",
        "        start += piece.shape[axis]",
        "chunks start at rows, not at numbers",
    ),
    Fault(
        "curvature/uses/slots.py",
        "return self.waits_in_graphs or not (self.refused or self.settled)",
        "return self.waits_in_graphs",
        "after a load weights are given up where no update is due",
    ),
    Fault(
        "curvature/uses/scopes.py",
        "        if torch._C._are_functorch_transforms_active():\n            return False\n",
        "",
        "transformed passes are looked at",
    ),
    Fault(
        "curvature/capture/calls.py",
        "return (base.is_contiguous() and view.is_contiguous()) or _long_axes(base) == "
        "_long_axes(view)",
        "return True",
        "an output in another order is overwritten in the order of its memory",
    ),
    Fault(
        "curvature/capture/calls.py",
        "            if not x_share.numel():  "
        "# an expert without tokens: its factors stay as they are\n"
        "                measured += [None] * len(statistics.hidden_leaves)\n"
        "                continue\n",
        "",
        "an expert without tokens has factors of zeros",
    ),
    Fault(
        "curvature/capture/rehearsal.py",
        "                buffer.copy_(before)",
        "                pass",
        "prepare() moves running means",
    ),
    Fault(
        "optim/params/registry.py",
        '        self._leave_to_fallback(replaced, "it is not added where its weight is used")\n',
        "",
        "a bias that is added by itself is not trained",
    ),
    Fault(
        "optim/params/watching.py",
        "        if blocks and not covers(blocks, watched.param.numel()):\n"
        "            weight.refuse(NOT_COVERED)\n            return\n",
        "",
        "a part that nothing uses is not trained",
    ),
    Fault(
        "optim/params/parts.py",
        '            own.setdefault(f"{label}]", {})[name] = value',
        "            own[name] = value",
        "states of parts are read into one",
    ),
    Fault(
        "optim/saved_state.py",
        "        if not saved <= labels:",
        "        if False:",
        "files of other parts are taken",
    ),
    Fault(
        "curvature/capture/hooks.py",
        "    if not torch.compiler.is_compiling():\n        return function(*args)",
        "    if True:\n        return function(*args)",
        "what is noted in a checkpoint does not compile",
    ),
    Fault(
        "curvature/uses/mode.py",
        "            self._traced_views.clear()",
        "            self._traced_views = []",
        "views in nested checkpoints do not compile",
    ),
    Fault(
        "curvature/uses/mode.py",
        "        if begun and begun >= _running(user):",
        "        if begun:",
        "a module that calls itself is taken for an interrupted one",
    ),
    Fault(
        "curvature/uses/mode.py",
        "            frames.append(_Frame(scope, None))",
        "            pass",
        "the end of a call without gradients is taken for that of the call around it",
    ),
    Fault(
        "curvature/uses/scopes.py",
        "                self._tell_evaluation()",
        "                pass",
        "calls in eval() mode are not told",
    ),
    Fault(
        "curvature/capture/calls.py",
        "            self._take_turns(shares, measured)\n            return measured",
        "            return measured",
        "passes without tokens for an expert are not counted",
    ),
    Fault(
        "curvature/capture/statistics.py",
        "        self._spoiled = False\n        self.turns.clear()\n",
        "        self._spoiled = False\n",
        "passes whose statistics were dropped are counted",
    ),
    Fault(
        "curvature/capture/resets.py",
        "            self._ended = False  # until then, which does not come if the pass fails\n",
        "",
        "a failed backward pass leaves statistics",
    ),
)
