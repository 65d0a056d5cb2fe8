"""One parser each, as `PARSER`; found by name, run by test_parsers.py and run.py."""
