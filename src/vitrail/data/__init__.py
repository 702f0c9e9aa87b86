"""Sources, audit, splits, decoding, views and loaders."""
