"""The folder of a study: its runs trained, resumed and scored."""
