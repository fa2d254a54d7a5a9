"""How a model answers: the engine, the server in front of it, and offline batches."""
