"""The HTTP server of ``omni-sp serve-embeddings``: OpenAI's shape over replicas of vLLM."""
