"""Texts in files: plain text, JSON lines, CSV, Parquet and Arrow, dataset folders, as documents.
Nothing is tokenized here.
"""
