"""Training objectives: each is a plain ``nn.Module`` with a ``loss``."""
