"""HTTP: the OpenAI surface, adapter administration, metrics."""
