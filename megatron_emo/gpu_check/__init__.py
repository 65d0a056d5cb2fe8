"""What only a CUDA device can prove about the loss, in one run with one verdict per check.

`record` is what a check fills, `run` runs them in order, `report` says what came out; every other
file is one check.
"""
