"""Pipelines that diffusers does not have (any more), on stock diffusers parts."""
