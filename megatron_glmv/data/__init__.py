"""Rows of packed samples: shards on disk, their global order, and the pictures decoded for the ranks that see them."""
