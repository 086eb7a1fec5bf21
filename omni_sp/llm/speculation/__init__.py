"""Drafts of an answer's next tokens, which the model verifies in one step."""
