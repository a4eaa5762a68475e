"""The one door for files: names, repositories, small documents, tensors; each written whole or not at all."""
