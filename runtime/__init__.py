"""The runtime: an engine for each model, the server in front of the engines, and offline batches."""
