"""See vllm_omni.entrypoints.omni and vllm_omni.entrypoints.cli.main."""
