"""Implementations of attention. Each has `unsupported_reason`; none imports another."""
