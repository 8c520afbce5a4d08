"""What the supervisor and its workers say to each other, and how the bytes travel.

Knows nobody: the standard library and msgspec only.
"""
