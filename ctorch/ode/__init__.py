"""Ordinary differential equations: problems in, solutions out."""
