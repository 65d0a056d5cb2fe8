"""Languages whose truth is known: what each objective learns of them, measured exactly."""
