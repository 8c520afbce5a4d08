"""The HTTP routes, one small file per family; each file exports its OPERATIONS."""
