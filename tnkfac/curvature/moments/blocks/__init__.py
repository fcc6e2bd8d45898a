"""Diagonal blocks of the second moments of unfolded inputs."""
