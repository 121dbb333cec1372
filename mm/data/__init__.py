"""Shards to batches: build, index, order, read, decode, load. Import the modules: nothing here imports torch early."""
