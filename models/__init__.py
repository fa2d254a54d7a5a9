"""What there is: manifests, the catalogue, the store and the ways a model gets into it. Imports nothing of ours."""
