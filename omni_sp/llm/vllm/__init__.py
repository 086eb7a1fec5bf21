"""Inside vLLM: a plugin, and decoders whose steps are sharded over ranks."""
