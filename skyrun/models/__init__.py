"""The networks, as functions of activations and of weights that are streamed block by block."""
