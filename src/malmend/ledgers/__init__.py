"""Ledgers of what a model carries: tables, tokens and sums on the disk, and what holds."""
