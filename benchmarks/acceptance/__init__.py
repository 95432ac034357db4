"""The steps of the acceptance run on a graphics card (on_a_card.py)."""
