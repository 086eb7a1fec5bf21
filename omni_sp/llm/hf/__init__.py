"""Language models of transformers over several ranks, without vLLM."""
