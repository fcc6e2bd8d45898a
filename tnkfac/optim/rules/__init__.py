"""How curvature becomes a preconditioner: the update rules."""
