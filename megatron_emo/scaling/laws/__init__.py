"""Laws of loss from a table of runs, with intervals."""
