"""What several test modules need: tiny models and adapters by transformers and PEFT, and engines in this process."""
