"""Faults of ``tnkfac/optim``."""

from fault import Fault

RULES: tuple[Fault, ...] = (
    Fault(
        "optim/rules/singd_rule.py",
        "(c.trace(H_C), for_K * c.trace(CC))",
        "(c.trace(H_C), for_K)",
        "damping of K lacks the trace of C",
    ),
    Fault(
        "optim/rules/singd_rule.py",
        "half * (-identity + pulled + damped)",
        "half * (identity + pulled + damped)",
        "the identity is added",
    ),
    Fault(
        "optim/rules/singd_rule.py",
        "tuple(x - part for x, part in zip(X, move, strict=True))",
        "tuple(x + part for x, part in zip(X, move, strict=True))",
        "K is moved the wrong way",
    ),
    Fault(
        "optim/rules/singd_rule.py",
        "step = tuple(alpha1 * old + part",
        "step = tuple(alpha1**2 * old + part",
        "momentum of K decays twice",
    ),
    Fault(
        "optim/rules/singd_rule.py",
        "return Damped(A, B, share * a, share * b, a * b)",
        "return Damped(A, B, share * b, share * a, a * b)",
        "relative dampings of IKFAC are exchanged",
    ),
    Fault(
        "optim/rules/singd_rule.py",
        "K, C = k.scaled(K, level**-0.25)",
        "K, C = k.scaled(K, level**-0.5)",
        "the start of K is scaled twice",
    ),
    Fault(
        "optim/rules/singd_rule.py",
        "return Applied(structure, batch.made_of(name, structure.square), True)",
        "return Applied(structure, batch.read(name), True)",
        "gradients meet K once",
    ),
    Fault(
        "optim/rules/singd_rule.py",
        "structure.scaled(W, -0.5 * rate)",
        "structure.scaled(W, 0.5 * rate)",
        "from the left K is moved the wrong way",
    ),
    Fault(
        "optim/rules/singd_rule.py",
        "shift = side.damping * other.structure.trace(other.square)",
        "shift = side.damping * side.structure.trace(side.square)",
        "damping from the left has the trace of its own side",
    ),
    Fault(
        "optim/rules/singd_rule.py",
        "rate = torch.clamp(2 * LARGEST_CHANGE / norm, max=lr_cov)",
        "rate = torch.clamp(4 * LARGEST_CHANGE / norm, max=lr_cov)",
        "the bound from the left is twice as large",
    ),
    Fault(
        "optim/params/batches.py",
        "old is source and version == now",
        "old is source",
        "squares outlive the factors that they are made of",
    ),
    Fault(
        "optim/params/auto_structure.py",
        "copies = 3 if group[",
        "copies = 2 if group[",
        "momenta of the factors are not counted",
    ),
    Fault(
        "optim/params/auto_structure.py",
        "                bound -= _present(layer).memory(_itemsizes(layer, group), copies)",
        "                pass",
        "layers that were there before are not counted",
    ),
    Fault(
        "optim/rules/singd_rule.py",
        "if step < before), 10)",
        "if step <= before), 10)",
        "an interval that grows is due a step late",
    ),
    Fault(
        "optim/rules/singd_start.py",
        "balance = (free_q / free_p / level).sqrt()",
        "balance = (free_p / free_q / level).sqrt()",
        "the scales of K and C are exchanged at the start",
    ),
    Fault(
        "optim/rules/kfac_rule.py",
        "o.lerp(n, 1 - decay)",
        "o.lerp(n, decay)",
        "averages forget what they should keep",
    ),
    Fault(
        "optim/rules/kfac_rule.py",
        "tuple((part / weight).to(dtype)",
        "tuple(part.to(dtype)",
        "the start of the averages is not corrected for",
    ),
    Fault(
        "optim/rules/decompositions.py",
        "pi = (mean_A / mean_B).sqrt()",
        "pi = (mean_B / mean_A).sqrt()",
        "pi is upside down",
    ),
    Fault(
        "optim/rules/decompositions.py",
        "scales + (shift * _level(scales) if self.relative else shift)",
        "scales + shift",
        "relative damping of EKFAC is absolute",
    ),
    Fault(
        "optim/rules/normalization.py",
        "more = 1 / positions**2 if",
        "more = 1 / positions if",
        "kfac-pytorch divides by positions once",
    ),
    Fault(
        "optim/rules/levenberg_marquardt.py",
        "damping *= FACTOR",
        "damping /= FACTOR",
        "damping rises where the model is right",
    ),
    Fault(
        "optim/rules/sampled_fisher.py",
        "return 0.5 * (output - drawn).square().sum()",
        "return (output - drawn).square().sum()",
        "the Gaussian likelihood lacks its half",
    ),
    Fault(
        "optim/rules/refreshing.py",
        'param_state["failures"].zero_()',
        "pass",
        "failures in a row are never forgotten",
    ),
    Fault(
        "optim/rules/refreshing.py",
        'for mark in ("last_update", "last_refresh"):',
        'for mark in ("last_refresh",):',
        "factors that begin anew count as measured",
    ),
    Fault(
        "optim/rules/runner.py",
        "if step < start + self.rule.update_interval(group, step):",
        "if step < start:",
        "a rough start is followed by no frequent updates",
    ),
    Fault(
        "optim/rules/runner.py",
        'group["last_refresh_due"] = step',
        'group["last_refresh_due"] = step - 1',
        "decompositions are due a step too late",
    ),
)

STEP: tuple[Fault, ...] = (
    Fault("optim/step/grafting.py", "RMS = 0.2", "RMS = 0.25", "the size of rms"),
    Fault(
        "optim/step/grafting.py",
        "_dot(update, gradient, on_host) * lr * lr",
        "_dot(update, gradient, on_host) * lr",
        "the trust region has the learning rate once",
    ),
    Fault(
        "optim/step/grafting.py",
        "second.lerp_(square, 1 - beta)",
        "second.lerp_(square, beta)",
        "second moments forget what they should keep",
    ),
    Fault(
        "optim/step/grafting.py",
        "return [hypot(*(next(norms) for _ in update.parts)) for update in updates]",
        "return [sum(next(norms) for _ in update.parts) for update in updates]",
        "norms of weight and bias add up",
    ),
    Fault(
        "optim/step/apply.py",
        "fresh = 1 - momentum if options.averaged else 1.0",
        "fresh = 1.0",
        "the plain buffer is no average",
    ),
    Fault(
        "optim/step/apply.py",
        "dampening = momentum if options.averaged else 0.0",
        "dampening = 0.0",
        "the buffer is no average",
    ),
    Fault(
        "optim/step/apply.py",
        "decay, dampening = decay * (1 - momentum), 0.0",
        "decay, dampening = decay, 0.0",
        "Nesterov's decay is not averaged",
    ),
    Fault(
        "optim/step/apply.py",
        "torch._foreach_mul_(params, 1 - lr * decay * gate)",
        "torch._foreach_mul_(params, 1 - lr * decay)",
        "a skipped batch decays parameters",
    ),
    Fault(
        "optim/step/elementwise.py",
        "outputs = [part * scale for part in outputs]",
        "outputs = [part / scale for part in outputs]",
        "large layers are sized upside down",
    ),
    Fault(
        "optim/step/fallback.py",
        'lr * (of_group / group["base_lr"])',
        "lr",
        "the fallback's learning rate has no schedule",
    ),
    Fault(
        "optim/finite.py",
        "return largest - largest == 0",
        "return largest == largest",
        "infinite numbers pass on a device",
    ),
)

PARAMS: tuple[Fault, ...] = (
    Fault(
        "optim/params/state.py",
        "good = good & (found_inf.to(good.device) == 0)",
        "good = good",
        "a bad batch changes factors on a device",
    ),
    Fault(
        "optim/params/batches.py",
        "return [tuple(piece[i] for piece in pieces) for i in range(count)]",
        "return [tuple(piece[count - 1 - i] for piece in pieces) for i in range(count)]",
        "layers of a stack get one another's results",
    ),
    Fault(
        "optim/params/auto_structure.py",
        "while total > bound and gains:",
        "while total > 2 * bound and gains:",
        "bounds on the state are loose",
    ),
    Fault(
        "optim/params/registry.py",
        "layer.bias_group = group_of[id(layer.bias)]",
        "pass",
        "a bias has the options of its weight",
    ),
    Fault(
        "optim/checkpoint.py",
        'set_mark(state, layer, "last_refresh", -1)',
        "pass",
        "what a compact file lacks is not made anew",
    ),
    Fault(
        "optim/checkpoint.py",
        'known.get(name.split(".")[0], value.dtype)',
        "value.dtype",
        "states keep the precision of the file",
    ),
    Fault(
        "optim/saved_state.py",
        "part.shape != expected.shape",
        "part.ndim != expected.ndim",
        "tensors of other sizes are taken",
    ),
    Fault(
        "optim/distributed/assignment.py",
        "loads[inv_worker] += costs[i]",
        "loads[inv_worker] += 1",
        "all layers count alike",
    ),
    Fault(
        "optim/base.py",
        "self._registry.clear()\n        self._excluded = False",
        "self._excluded = False",
        "statistics of the last step count again",
    ),
    Fault(
        "optim/base.py", "self._skipped.add(found_inf)", "pass", "skipped batches are not counted"
    ),
)

FAULTS: tuple[Fault, ...] = (*RULES, *STEP, *PARAMS)
