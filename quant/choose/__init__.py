"""Choose the type of each tensor: by a recipe, by measured errors, or by a target size."""
