"""See vllm_omni.diffusion.data."""
