"""The model that is distilled: how it is read, called, and what it is told of a caption and a picture."""
