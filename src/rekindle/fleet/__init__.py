"""Replicas of engines and what supervises them."""
