"""Implementations of attention. `native` alone has `unsupported_reason`: the others do every call.

None imports another. CONTRIBUTING.md says which functions a kernel has.
"""
