"""Transformer definitions over the kernels: one shared decoder, and one short file for each family.

A family's file reads a Hugging Face `config.json` into an `Architecture`; the decoder does the rest.
"""
