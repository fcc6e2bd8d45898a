"""Methods that run as they are where what calls them is compiled."""

from torch._compile import _disable_dynamo

uncompiled = _disable_dynamo
"""Decorator that breaks a compiled graph at a call, as torch does at methods of its optimizers.

Unlike ``torch.compiler.disable`` it imports the compiler at the first call only.
"""
