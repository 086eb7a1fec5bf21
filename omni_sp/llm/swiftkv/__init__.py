"""SwiftKV: models whose late layers take keys and values from one hidden state, so that prompts leave before them."""

ARCHITECTURES = {f"{name}SwiftKVForCausalLM": f"{name}ForCausalLM" for name in ("Llama", "Qwen2", "Qwen3")}
"""The architecture of a SwiftKV model, and of the model that it was made from."""
