"""What the models do and how: specs of tasks, sizes, windows. Nothing here imports torch."""
