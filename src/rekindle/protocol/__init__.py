"""Frozen records that cross a process boundary. Data only: no behaviour beyond validation, no I/O."""
