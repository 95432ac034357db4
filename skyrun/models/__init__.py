"""The networks as functions over weights that pass by."""
