"""Makes the small checkpoint that the server ships as `demo`: data, training, tests, export."""
