"""The routes, their schemas and what they stream."""
