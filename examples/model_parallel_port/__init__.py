"""A script for Lightning's ``ModelParallelStrategy``, of which one line has been changed."""
