"""Pictures of a study, each with the numbers it shows."""
