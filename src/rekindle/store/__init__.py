"""Where bytes are: the home directory, import of models and adapters, the files they become."""
