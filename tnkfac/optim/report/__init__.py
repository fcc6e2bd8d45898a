"""Tables, spectra and warnings for the user."""
