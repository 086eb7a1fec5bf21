"""Embeddings of many texts: several unpatched vLLM servers as replicas, and clients for what stands before them."""
