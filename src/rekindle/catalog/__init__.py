"""What exists: models, adapters and their versions, by name, in a database that survives restarts."""
