"""Finding images by their embeddings: indexes and searches that use as much of an embedding as a query needs."""
