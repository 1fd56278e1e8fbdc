"""Names and content digests, kept apart by type."""

from __future__ import annotations

from typing import NewType

RequestId = NewType("RequestId", str)
"""Unique for the life of a gateway; one request with n choices becomes n of these."""

ModelDigest = NewType("ModelDigest", str)
"""SHA-256, in hexadecimal, of a base model's tensors, configuration, tokenizer and chat template."""

AdapterDigest = NewType("AdapterDigest", str)
"""SHA-256, in hexadecimal, of an adapter version's tensors, configuration and chat template."""
