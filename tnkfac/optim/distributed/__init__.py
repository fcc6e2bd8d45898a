"""Communication of the processes that train one model."""
