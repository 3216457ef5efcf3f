"""Traced functions lowered to C++, compiled, cached, loaded."""
