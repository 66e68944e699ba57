"""The paper, one file a section: tensors in, tensors out."""
