"""Which parameters there are, and what is kept for them."""
