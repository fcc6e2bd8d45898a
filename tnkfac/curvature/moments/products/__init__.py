"""Products of rows with themselves."""
