"""The low-bit modules and the conversion that puts them in place."""
