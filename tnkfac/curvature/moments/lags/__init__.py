"""Second moments of unfolded inputs from lags and borders; :mod:`.gather` says how."""
