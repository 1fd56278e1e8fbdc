"""What exists: models, adapters, their versions and aliases, in a database that survives restarts."""
