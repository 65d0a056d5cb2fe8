"""From a plan's file to its runs, and what speaks against them."""
