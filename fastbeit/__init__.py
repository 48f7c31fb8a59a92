"""fastbeit pre-trains BEiT: a ViT that predicts the visual tokens of masked patches (arXiv 2106.08254)."""

__version__ = "0.1.0"
