"""Time, memory and exactness of the output layer with its loss, all variants in one run.

`variants` says what is compared (`ours`, `others`), `tokens` where target ids come from, `measure`
how times are taken, `memory` and `sweep` what lives at once, `collectives` what ranks ask of each
other, `steps` what whole training steps take, `roofline` what a GPU must take, `report` what is
shown, `command` the flags.
"""
