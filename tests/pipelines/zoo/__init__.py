"""Whole diffusers pipelines from tiny components with random weights; text mostly comes as embeddings."""
