"""Pure decisions and what they rest on: no clock, no input or output, no randomness, no torch."""
