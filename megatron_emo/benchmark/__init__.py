"""Time, memory and exactness of the output layer with its loss, all variants in one run.

`variants` says what is compared, `tokens` where target ids come from, `measure` how, `report` what
is shown.
"""
