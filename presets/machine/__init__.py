"""The machine that a plan is for: its card, its memory and its disk, measured or from the table of cards."""
