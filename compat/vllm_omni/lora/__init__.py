"""See vllm_omni.inputs.data."""
