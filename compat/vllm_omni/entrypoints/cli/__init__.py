"""See vllm_omni.entrypoints.cli.main."""
