"""Read what there is to convert: files of every format, the models in them, their metadata and tokenizers."""
