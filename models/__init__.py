"""Manifests, the catalogue, the store, and the ways a model gets into it. Imports no other package of Deskside."""
