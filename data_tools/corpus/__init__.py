"""Reading and writing corpora, and the frame that every tool over a corpus runs in."""
