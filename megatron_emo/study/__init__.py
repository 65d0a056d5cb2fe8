"""Studies: commands whose files build on each other, and the settings of the examples."""
