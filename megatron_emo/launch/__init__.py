"""Starting, watching and judging runs of many processes; needs neither Megatron nor a GPU."""
