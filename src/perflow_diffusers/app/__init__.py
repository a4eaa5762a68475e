"""The page: a pipeline that draws while someone types, beside the same pipeline without its accelerator."""
