"""SSPFormer: a frozen, self-supervised pretrained MRI transformer and the heads fine-tuned on it."""

__version__ = "0.1.0"
