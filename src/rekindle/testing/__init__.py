"""Public fakes and helpers that users may test with."""
