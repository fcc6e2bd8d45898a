"""Pictures of networks as in arXiv 2307.02275, by matplotlib."""
