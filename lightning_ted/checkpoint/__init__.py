"""Checkpoints are in model space: names and global shapes, whatever the layout that wrote them."""
