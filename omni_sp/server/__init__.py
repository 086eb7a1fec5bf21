"""The HTTP server: OpenAI's shapes over AsyncOmni, so that its client works unchanged."""
